// The page: one photo, its settings, one request at a time, and a comparison of both pictures.

import { bytesOf, events } from "./stream.js";

const $ = (id) => document.getElementById(id);

// Each has url, drawn (whether this browser can show it), width and height; null if there is none.
let photo = null;
let result = null;
// The AbortController of the request in flight.
let running = null;
// The number of its steps that are known to be done.
let stepsDone = 0;
let limits = {};

class Problem extends Error {
  constructor(status, detail, wait) {
    super(detail);
    Object.assign(this, { status, wait });
  }
}

// The model and the limits

async function load() {
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw await refusal(response);
    showModel(await response.json());
  } catch (error) {
    $("model").textContent = `${inWords(error)} Trying again.`;
    setTimeout(load, 3000);
  }
}

function showModel({ models: [model], limits: newLimits, token }) {
  limits = newLimits;
  $("model").textContent = model.name;
  $("limits").textContent += `, up to ${bytes(limits.bytes)} and ${megapixels(limits.pixels)}`;
  for (const id of ["steps", "steps-range"]) {
    $(id).max = limits.steps;
    $(id).value = model.steps;
  }
  $("tags").disabled = !model.tags;
  $("tags-hint").textContent = model.tags
    ? "Objects in the photo, such as cat, grass. With auto they are detected."
    : `${model.name} takes no tags: it was trained without them.`;
  $("token-field").hidden = !token;
  $("token").required = token;
  $("experts").replaceChildren(...model.experts.map(expert));
}

function expert(name) {
  const item = document.createElement("li");
  item.dataset.name = name;
  item.append(document.createElement("b"), document.createElement("span"));
  item.firstChild.textContent = name;
  return item;
}

// The photo

async function choose([file, ...others]) {
  if (!file) return;
  forget();
  const mine = { file, url: URL.createObjectURL(file) };
  photo = mine;
  Object.assign(mine, await decode(mine.url));
  if (photo !== mine) return;
  $("before").src = mine.url;
  say(others.length ? `One photo at a time: this is ${file.name}.` : "");
  show();
  checkLimits();
}

// A picture stays in memory until its object URL is revoked.
function forget() {
  running?.abort();
  for (const shown of [photo, result]) if (shown) URL.revokeObjectURL(shown.url);
  photo = result = running = null;
  clear();
}

async function decode(url) {
  const image = new Image();
  image.src = url;
  const drawn = await image.decode().then(() => true, () => false);
  return { drawn, width: image.naturalWidth, height: image.naturalHeight };
}

function checkLimits() {
  const pixels = photo.width * photo.height;
  if (photo.file.size > limits.bytes) {
    const size = bytes(photo.file.size);
    complain("file", `This photo has ${size}, more than the limit of ${bytes(limits.bytes)}.`);
  } else if (photo.drawn && pixels > limits.pixels) {
    const size = `${photo.width} × ${photo.height} pixels`;
    complain("file", `This photo has ${size}, more than the limit of ${megapixels(limits.pixels)}.`);
  }
}

// The request

async function upscale() {
  clear();
  if (!photo || running || !isValid()) return;
  const mine = new AbortController();
  running = mine;
  const stopClock = begin();
  try {
    await finish(await request(mine.signal), mine.signal);
  } catch (error) {
    // Another photo may have been chosen meanwhile.
    if (running === mine) fail(error, mine.signal);
  } finally {
    stopClock();
  }
  if (running !== mine) return;
  running = null;
  show();
}

async function request(signal) {
  const init = { method: "POST", body: fields(), headers: headers(), signal };
  const response = await fetch("v1/upscale", init);
  if (!response.ok) throw await refusal(response);
  for await (const [name, data] of events(response.body)) {
    if (name === "progress") progressed(data);
    if (name === "error") throw new Problem(data.status, data.detail);
    if (name === "result") return data;
  }
  throw new TypeError("the stream ended before the result");
}

function fields() {
  const data = new FormData($("form"));
  for (const [name, value] of [...data]) if (value === "") data.delete(name);
  // The number field holds the scale, even if a preset was chosen.
  data.delete("preset");
  data.set("image", photo.file, photo.file.name);
  return data;
}

function headers() {
  const token = $("token").value;
  return { Accept: "text/event-stream", ...(token && { Authorization: `Bearer ${token}` }) };
}

function isValid() {
  const advice = {
    token: "This server requires an access token.",
    scale: "Enter a number from 1 to 4.",
    steps: `Enter a whole number from 1 to ${$("steps").max}.`,
    seed: "Enter a whole number, zero or more.",
  };
  const wrong = Object.keys(advice).filter((id) => !$(id).checkValidity());
  // The last complaint takes the focus, so that must be the one about the first field.
  for (const id of wrong.reverse()) complain(id, advice[id]);
  return wrong.length === 0;
}

function begin() {
  const start = performance.now();
  const tick = () => {
    $("elapsed").textContent = `${Math.floor((performance.now() - start) / 1000)} s`;
  };
  const timer = setInterval(tick, 1000);
  for (const item of $("experts").children) mark(item, "waiting");
  stepsDone = $("progress").value = 0;
  say("Sent. Waiting for its turn.");
  tick();
  show();
  return () => {
    clearInterval(timer);
    $("elapsed").textContent = "";
  };
}

// An expert begins (at the last step known, or at an earlier one if the request was started again),
// or has ended its steps. Experts before it without an event had no steps to take.
function progressed({ expert, step, steps, percent }) {
  const items = [...$("experts").children];
  const place = items.findIndex((item) => item.dataset.name === expert);
  const working = step <= stepsDone ? place : step < steps ? place + 1 : items.length;
  stepsDone = step;
  for (const [i, item] of items.entries()) {
    if (i === working) mark(item, "working");
    else if (i > working) mark(item, "waiting");
    else if (i === place) mark(item, "done");
    else if (item.dataset.state !== "done") mark(item, "idle");
  }
  $("progress").value = percent;
  const now = items[working] ? `${items[working].dataset.name} is running` : "writing the file";
  say(`${percent}%, ${step} of ${steps} steps: ${now}.`);
}

const STATES = { waiting: "waiting", working: "running", done: "done", idle: "no steps" };

function mark(item, state, words = STATES[state]) {
  item.dataset.state = state;
  item.lastChild.textContent = words;
}

// The result

async function finish(data, signal) {
  const blob = new Blob(bytesOf(data.image), { type: data.media_type });
  const received = { ...data, image: null, url: URL.createObjectURL(blob), size: blob.size };
  received.drawn = (await decode(received.url)).drawn;
  if (signal.aborted) URL.revokeObjectURL(received.url);
  signal.throwIfAborted();
  if (result) URL.revokeObjectURL(result.url);
  else reveal();
  result = received;
  $("after").src = received.url;
  Object.assign($("download"), { href: received.url, download: received.filename });
  showTimes();
  report();
}

function showTimes() {
  for (const item of $("experts").children) {
    const time = result.timing[item.dataset.name];
    if (time === undefined) mark(item, "idle");
    else mark(item, "done", seconds(time));
  }
}

function report() {
  const { timing, steps, seed, scale, drawn, width } = result;
  const all = Object.values(timing).reduce((sum, time) => sum + time, 0);
  const count = steps === 1 ? "1 step" : `${steps} steps`;
  const resampled = photo.drawn && width !== even(photo.width * scale)
    ? ` The model worked at ${number(scale)}×; its result was resampled.` : "";
  const unseen = drawn ? "" : " This browser cannot show the result; download it.";
  say(`Done in ${seconds(all)} with ${count} and seed ${seed}.${resampled}${unseen}`);
}

// Problems, each shown beside its cause

const CAUSES = { 400: "file", 401: "token", 413: "file", 415: "file" };

async function refusal(response) {
  const { status, statusText, headers } = response;
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail || `the server answered ${status} ${statusText}`;
  return new Problem(status, detail, headers.get("Retry-After"));
}

function fail(error, signal) {
  say(signal.aborted ? "Cancelled." : "");
  if (result) showTimes();
  if (signal.aborted) return;
  const field = error.status === 422 && /^\w+(?=:)/.exec(error.message)?.[0];
  const cause = CAUSES[error.status] ?? field;
  if (cause === "token") $("token-field").hidden = false;
  complain($(`${cause}-problem`) ? cause : "start", inWords(error));
}

function inWords(error) {
  if (!(error instanceof Problem)) {
    return "The server does not answer; check the connection and try again.";
  }
  if (error.status === 401) return "The access token is missing or wrong.";
  if (error.status === 429) return `The server is busy; try again in ${error.wait ?? "a few"} s.`;
  // The message is shown beside the field or photo that it names.
  const words = error.message.replace(/^(the picture|\w+): /, "");
  return `${words[0].toUpperCase()}${words.slice(1)}`.replace(/\.?$/, ".");
}

function complain(id, words) {
  $(`${id}-problem`).textContent = words;
  if (!$(id).closest(".field")) return;
  $(id).setAttribute("aria-invalid", "true");
  $(id).focus();
}

function clear() {
  for (const line of document.querySelectorAll(".problem")) line.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
  }
}

// The view

function show() {
  const held = document.activeElement;
  const shown = result?.drawn ? result : photo;
  const compared = Boolean(photo?.drawn && result?.drawn);
  const visible = {
    file: !photo,
    drop: !photo,
    compare: shown?.drawn,
    before: photo?.drawn,
    after: result?.drawn,
    blank: photo && !shown.drawn,
    bar: photo,
    start: !running,
    cancel: running,
    download: result && !running,
    other: !running,
    run: running || result,
  };
  for (const [id, is] of Object.entries(visible)) $(id).hidden = !is;
  $("compare").classList.toggle("compared", compared);
  if (!result?.drawn) actualSize(false);
  measure();
  label();
  if (!held.hidden) return;
  // The focused element is hidden now: focus the next one.
  const next = running ? "cancel" : compared ? "slider" : result ? "download" : "start";
  $(next).focus();
}

// The photo takes the space of its result, so that nothing jumps when that arrives.
function measure() {
  const [width, height] = outcome();
  const { style } = $("compare");
  style.setProperty("--w", width);
  style.setProperty("--h", height);
  style.setProperty("--dpr", devicePixelRatio);
  const fits = $("compare").clientWidth >= Math.floor(width / devicePixelRatio);
  $("zoom").hidden = !result?.drawn || (fits && !isActualSize());
}

function outcome() {
  if (result) return [result.width, result.height];
  const scale = $("scale").validity.valid ? $("scale").valueAsNumber : 1;
  return photo ? [even(photo.width * scale), even(photo.height * scale)] : [0, 0];
}

const FORMATS = {
  "image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WebP", "image/tiff": "TIFF",
};

function label() {
  if (!photo) return;
  const [width, height] = outcome();
  const from = photo.drawn ? `${photo.width} × ${photo.height}` : bytes(photo.file.size);
  const to = width ? ` → ${width} × ${height}` : "";
  const type = result ? `, ${FORMATS[result.media_type]} ${bytes(result.size)}` : "";
  $("name").textContent = photo.file.name;
  $("size").textContent = from + to + type;
  $("start").textContent = result ? "Upscale again" : "Upscale";
  $("start").classList.toggle("main", !result);
  $("blank").textContent =
    `This browser cannot show ${photo.file.name}. If it is a photo, it can still be upscaled.`;
}

function slide() {
  const { value } = $("slider");
  $("compare").style.setProperty("--at", `${value}%`);
  $("slider").setAttribute("aria-valuetext", `${value}% before, ${100 - value}% after`);
}

// Reveal the first result of a photo with a wipe.
function reveal() {
  const compare = $("compare");
  $("slider").value = 50;
  compare.classList.remove("reveal");
  compare.style.setProperty("--at", "100%");
  // Reading the style applies it; otherwise the transition would begin at its end.
  getComputedStyle(compare).getPropertyValue("--at");
  compare.classList.add("reveal");
  slide();
}

const isActualSize = () => $("compare").classList.contains("actual");

function actualSize(on) {
  const pan = $("pan");
  pan.hidden = !on;
  $("compare").classList.toggle("actual", on);
  $("zoom").setAttribute("aria-pressed", on);
  pan.scrollTo((pan.scrollWidth - pan.clientWidth) / 2, (pan.scrollHeight - pan.clientHeight) / 2);
  panned();
}

function panned() {
  $("compare").style.setProperty("--x", $("pan").scrollLeft);
  $("compare").style.setProperty("--y", $("pan").scrollTop);
}

function drag(event) {
  if (event.buttons === 1 && event.pointerType === "mouse") {
    $("pan").scrollBy(-event.movementX, -event.movementY);
  }
}

function say(words) {
  // Screen readers would repeat a text that is set again.
  if ($("status").textContent !== words) $("status").textContent = words;
}

// Quantities

// Round to the nearest whole number, and halves to the even one, as the server does.
const even = (x) => (x % 2 === 0.5 ? Math.floor(x) : Math.round(x));
const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const megapixels = (pixels) => `${number(pixels / 1e6)} megapixels`;

function bytes(n) {
  if (n < 1e3) return `${n} bytes`;
  return n < 1e6 ? `${number(n / 1e3)} kB` : `${number(n / 1e6)} MB`;
}

// Events

const on = (id, event, act) => $(id).addEventListener(event, act);

on("file", "change", ({ target }) => {
  choose([...target.files]);
  // Otherwise the same file could not be chosen again.
  target.value = "";
});
on("other", "click", () => $("file").click());
on("form", "submit", (event) => {
  event.preventDefault();
  upscale();
});
// Ignore the second click of a double click on the start button, which stood in the same place.
on("cancel", "click", ({ detail }) => detail < 2 && running.abort());
on("scales", "input", ({ target }) => {
  if (target !== $("scale")) $("scale").value = target.value;
  for (const preset of document.getElementsByName("preset")) {
    preset.checked = Number(preset.value) === $("scale").valueAsNumber;
  }
});
on("scales", "change", show);
on("detail", "input", () => ($("detail-value").value = $("detail").value));
on("steps", "input", () => ($("steps-range").value = $("steps").value));
on("steps-range", "input", () => ($("steps").value = $("steps-range").value));
on("slider", "input", () => {
  $("compare").classList.remove("reveal");
  slide();
});
on("zoom", "click", () => {
  actualSize(!isActualSize());
  measure();
});
on("pan", "scroll", panned);
on("pan", "pointermove", drag);

addEventListener("resize", measure);
addEventListener("paste", ({ clipboardData }) => choose([...clipboardData.files]));
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  choose([...event.dataTransfer.files]);
});

load();
