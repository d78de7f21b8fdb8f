// The page: photos, their settings, one request at a time, and a comparison of both pictures.

import * as compare from "./compare.js";
import * as crop from "./crop.js";
import { cut, draw, drawThumbnail, dropped, isVisible, kindOf, save } from "./files.js";
import { describe, estimate, inWords, Problem, upscale } from "./server.js";
import { bytes, even, measured, megapixels, number, photos, sentence, span } from "./words.js";
import { zip } from "./zip.js";

const $ = (id) => document.getElementById(id);

// Results stay in the browser until they are removed. Beyond so many bytes no photo is begun.
const MOST_BYTES = 1e9;
const PRESETS = [4, 3, 2, 1.5, 1];

// Each photo has
//   file, kind, width, height (0 if the browser cannot draw it), row (its line in the list);
//   original: { file, width, height } before a crop;
//   state: reading, ready, queued, running, done, failed or cancelled; problem: [id, words];
//   percent, and result, which has blob, width, height and what the server says of it.
let items = [];
// The photo on the stage, and the object URLs of its two pictures.
let selected = null;
let shown = null;
// The AbortController of all requests, and of the one in flight, with { item, start, ... }.
let queue = null;
let running = null;
let server = null;
// The scale that the user wants; a photo gets less if the limits demand it.
let wanted = 4;
// Answers to /v1/estimate by their query.
const estimates = new Map();

// The model and the limits

async function load() {
  try {
    server = await describe();
  } catch (error) {
    $("model").textContent = `${inWords(error)} Trying again.`;
    setTimeout(load, 3000);
    return;
  }
  const { model, limits, token } = server;
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
  show();
}

function expert(name) {
  const item = document.createElement("li");
  item.dataset.name = name;
  item.append(document.createElement("b"), document.createElement("span"));
  item.firstChild.textContent = name;
  return item;
}

// The photos

// fromFolder: whether the user chose a folder, whose hidden files nobody meant.
async function add(files, fromFolder = false) {
  clear();
  const meant = fromFolder ? files.filter(isVisible) : files;
  const kinds = await Promise.all(meant.map(kindOf));
  const known = (i) => kinds[i] && kinds[i] !== "heic";
  const added = meant.flatMap((file, i) => (known(i) ? [newItem(file, kinds[i])] : []));
  if (fromFolder) added.sort((a, b) => order.compare(pathOf(a.file), pathOf(b.file)));
  items.push(...added);
  $("rows").append(...added.map(({ row }) => row));
  if (added.length) {
    if (!queue) say("");
    select(added[0]);
  }
  complainOf(meant.filter((_, i) => !known(i)), kinds.includes("heic"), added.length);
  for (const item of added) await item.read();
}

const order = new Intl.Collator("en", { numeric: true });
const pathOf = (file) => file.webkitRelativePath || file.name;

function complainOf(left, heic, added) {
  if (!left.length) return;
  const [{ name }] = left;
  const others = left.length > 1 ? ` and ${left.length - 1} more` : "";
  const advice = heic ? "Export HEIC photos as JPEG first." : "";
  const words = added || others
    ? `${name}${others}: not a picture that can be read here, so left out.`
    : `${name} is not a picture that can be read here.`;
  complain("file", `${words} ${advice}`.trim());
}

function newItem(file, kind) {
  const row = $("row").content.firstElementChild.cloneNode(true);
  const item = { file, kind, row, width: 0, height: 0, state: "reading", percent: 0 };
  // Photos are read once, when their turn comes or when they are looked at.
  let reading;
  item.read = () => (reading ??= measure(item));
  row.querySelector("b").textContent = file.name;
  row.querySelector(".pick").addEventListener("click", () => select(item));
  row.querySelector(".save").addEventListener("click", () => save(item.result.blob, item.result.filename));
  row.querySelector(".save").setAttribute("aria-label", `Download ${file.name}`);
  row.querySelector(".remove").addEventListener("click", () => drop(item));
  return item;
}

async function measure(item) {
  const image = await draw(item.file);
  if (image) {
    item.width = image.naturalWidth;
    item.height = image.naturalHeight;
    drawThumbnail(item.row.querySelector("canvas"), image);
  }
  item.original = { file: item.file, width: item.width, height: item.height };
  if (item.state === "reading") item.state = queue && !obstacle(item) ? "queued" : "ready";
  show();
}

// Cancel the work on a photo, or remove it if there is none.
function drop(item) {
  if (item.state === "running") running.abort();
  else if (item.state === "queued") item.state = "cancelled";
  else remove(item);
  show();
}

function remove(item) {
  const place = items.indexOf(item);
  const { row } = item;
  const next = row.nextElementSibling ?? row.previousElementSibling;
  const held = row.contains(document.activeElement);
  items.splice(place, 1);
  row.remove();
  if (selected === item) select(items[Math.min(place, items.length - 1)] ?? null);
  if (held) (next?.querySelector(".remove") ?? $("file")).focus();
}

function removeAll() {
  queue?.abort();
  items = [];
  $("rows").replaceChildren();
  select(null);
  say("");
  $("file").focus();
}

async function select(item) {
  crop.end();
  clear();
  selected = item;
  if (item?.problem) complain(...item.problem);
  present();
  await item?.read();
  if (selected === item) show();
}

// Put both pictures on the stage. A picture stays in memory until its object URL is revoked.
function present() {
  for (const url of Object.values(shown?.urls ?? {})) URL.revokeObjectURL(url);
  shown = null;
  for (const id of ["before", "after"]) $(id).removeAttribute("src");
  compare.setZoom(0);
  compare.centreSlider();
  if (!selected) return show();
  const before = crop.rectangle() ? selected.original.file : selected.file;
  shown = { urls: { before: URL.createObjectURL(before) } };
  $("before").src = shown.urls.before;
  return selected.result ? presentResult() : show();
}

async function presentResult() {
  const mine = shown;
  const { result } = selected;
  if (mine.urls.after) URL.revokeObjectURL(mine.urls.after);
  mine.urls.after = URL.createObjectURL(result.blob);
  Object.assign($("download"), { href: mine.urls.after, download: result.filename });
  // A new element: Firefox decodes nothing more in one whose last picture it could not read.
  const image = new Image();
  Object.assign(image, { id: "after", alt: "After", draggable: false, hidden: true });
  image.src = mine.urls.after;
  result.drawn = await image.decode().then(() => true, () => false);
  if (shown !== mine) return;
  $("after").replaceWith(image);
  show();
}

// The limits

const admits = ({ width, height }, scale) =>
  even(width * scale) * even(height * scale) <= server.limits.output_pixels;

// Return the scale of a photo: the one that is wanted, or the largest preset that the limits admit.
function scaleOf(item) {
  if (!server || !item.width) return wanted;
  const smaller = PRESETS.filter((preset) => preset < wanted);
  return [wanted, ...smaller].find((scale) => admits(item, scale)) ?? wanted;
}

// Return why the server would refuse a photo, or an empty string.
function obstacle(item) {
  if (!server) return "";
  const { limits } = server;
  const pixels = item.width * item.height;
  const help = item.width ? " Crop it to a part." : "";
  if (item.file.size > limits.bytes) {
    return `This photo has ${bytes(item.file.size)}, and this server takes at most ${bytes(limits.bytes)}.${help}`;
  }
  if (pixels > limits.pixels) {
    return `This photo has ${megapixels(pixels)}, and this server takes at most ${megapixels(limits.pixels)}.${help}`;
  }
  if (pixels > limits.output_pixels) {
    return `The result would have more than this server's limit of ${megapixels(limits.output_pixels)}.${help}`;
  }
  const answer = estimates.get(query(item));
  return answer && !answer.fits ? sentence(answer.detail) : "";
}

// Return why a photo gets less than the scale that is wanted, or an empty string.
function reduction(item) {
  const scale = scaleOf(item);
  if (scale === wanted) return "";
  const pixels = megapixels(item.width * item.height * wanted ** 2);
  const limit = megapixels(server.limits.output_pixels);
  return `At ${number(wanted)}× the result would have ${pixels}, more than this server's limit of ${limit}, so ${number(scale)}× is chosen. Crop the photo to enlarge a part of it more.`;
}

// The time

function query(item) {
  const { width, height } = item;
  const [steps, detail] = [$("steps").value, $("detail").value];
  return new URLSearchParams({ width, height, scale: scaleOf(item), steps, detail }).toString();
}

// The AbortController of the question in flight.
let asking = null;

// Ask the server how long the photos will take, the one on the stage first.
async function ask() {
  if (asking || !server || document.hidden) return;
  const open = [selected, ...items].find((item) => item?.width && !estimates.has(query(item)));
  if (!open || !isComplete()) return;
  const { signal } = (asking = new AbortController());
  const question = query(open);
  const answer = await estimate(question, signal).catch(() => null);
  asking = null;
  if (signal.aborted) return;
  estimates.set(question, answer);
  // The server may not be ready yet.
  if (!answer) setTimeout(() => estimates.delete(question) && ask(), 10_000);
  show();
}

// Nobody reads the answer while the page is hidden, and none comes when it is left.
document.addEventListener("visibilitychange", () => (document.hidden ? asking?.abort() : ask()));

const isComplete = () => $("steps").checkValidity() && $("scale").checkValidity();

// Return the seconds that these photos take, or undefined if one is not known.
function secondsOf(some) {
  const known = some.map((item) => item.width && estimates.get(query(item))?.seconds);
  return known.every(Boolean) ? known.reduce((sum, time) => sum + time, 0) : undefined;
}

function forecast() {
  const some = pending();
  const time = secondsOf(some);
  if (!time || crop.rectangle()) return "";
  const which = items.length > 1 ? `${photos(some.length)} will take` : "This will take";
  return `${which} about ${span(time)} on this server.`;
}

// The queue

const isUsable = (item) => item.state !== "reading" && !obstacle(item);
const isOpen = (item) => ["ready", "failed", "cancelled"].includes(item.state) ||
  (item.state === "done" && item.result.settings !== settings(item));

// Return the photos that the button would upscale: those without a result of these settings, or all.
function pending() {
  const usable = items.filter(isUsable);
  const open = usable.filter(isOpen);
  return open.length ? open : usable;
}

async function start() {
  clear();
  if (queue || !isValid()) return;
  for (const item of pending()) Object.assign(item, { state: "queued", problem: null, percent: 0 });
  const mine = new AbortController();
  queue = mine;
  for (let item = await next(); item && !mine.signal.aborted; item = await next()) {
    const held = items.reduce((sum, { result }) => sum + (result?.blob.size ?? 0), 0);
    if (held > MOST_BYTES) {
      complain("start", `The results fill ${bytes(held)} of this browser's memory. Download and remove some, then go on.`);
      break;
    }
    await work(item, mine);
  }
  queue = null;
  for (const item of items) if (item.state === "queued") item.state = "ready";
  show();
}

// Return the next photo to upscale. One that is still being read joins the queue after that.
async function next() {
  const unread = items.find(({ state }) => state === "reading");
  const queued = items.find(({ state }) => state === "queued");
  if (queued || !unread) return queued;
  await unread.read();
  return next();
}

// Upscale one photo.
async function work(item, all) {
  const mine = new AbortController();
  const abort = () => mine.abort();
  all.signal.addEventListener("abort", abort);
  running = mine;
  Object.assign(mine, { item, step: 0, percent: 0, start: performance.now(), question: query(item) });
  item.state = "running";
  const timer = setInterval(tick, 500);
  for (const line of $("experts").children) mark(line, "waiting");
  say(`${nameIn(item)}Sent. Waiting for its turn.`);
  tick();
  show();
  try {
    const made = settings(item);
    const result = await upscale(fields(item), $("token").value, mine.signal, progressed);
    mine.signal.throwIfAborted();
    await finish(item, { ...result, settings: made });
  } catch (error) {
    fail(item, error, mine.signal);
  } finally {
    clearInterval(timer);
    all.signal.removeEventListener("abort", abort);
    running = null;
    $("elapsed").textContent = "";
    show();
  }
}

const nameIn = (item) => (items.length > 1 ? `${item.file.name}: ` : "");

function fields(item) {
  const data = new FormData($("form"));
  for (const [name, value] of [...data]) if (value === "") data.delete(name);
  for (const name of ["preset", "zoom"]) data.delete(name);
  data.set("scale", scaleOf(item));
  const format = ORIGINAL[item.kind];
  if (isCropped(item) && format && !data.has("format")) data.set("format", format);
  data.set("image", item.file, item.file.name);
  return data;
}

// A crop is sent as PNG; its result has the format of the photo all the same.
const ORIGINAL = { jpeg: "jpg", webp: "webp" };
const isCropped = (item) => Boolean(item.original) && item.file !== item.original.file;

// Return all that decides the pixels of a result, as text.
function settings(item) {
  const values = [...fields(item)].filter(([name]) => name !== "image");
  return JSON.stringify([...values, item.file.size, item.file.name]);
}

const ADVICE = {
  token: () => "This server requires an access token.",
  scale: () => "Enter a number from 1 to 4.",
  steps: () => `Enter a whole number from 1 to ${$("steps").max}.`,
  seed: () => "Enter a whole number, zero or more.",
};

function isValid() {
  const wrong = Object.keys(ADVICE).filter((id) => !$(id).checkValidity());
  // The last complaint takes the focus, so that must be the one about the first field.
  for (const id of wrong.reverse()) complain(id, ADVICE[id]());
  return wrong.length === 0;
}

// Progress

// An expert begins (at the last step known, or at an earlier one if the request was started again),
// or has ended its steps. Experts before it without an event had no steps to take.
function progressed({ wait, expert, step, steps, percent }) {
  const name = nameIn(running.item);
  if (wait) return say(`${name}The server is busy. Trying again in ${wait} s.`);
  const lines = [...$("experts").children];
  const place = lines.findIndex((line) => line.dataset.name === expert);
  const working = step <= running.step ? place : step < steps ? place + 1 : lines.length;
  for (const [i, line] of lines.entries()) {
    if (i === working) mark(line, "working");
    else if (i > working) mark(line, "waiting");
    else if (i === place) mark(line, "done");
    else if (line.dataset.state !== "done") mark(line, "idle");
  }
  running.began ??= performance.now();
  const again = step < running.step;
  Object.assign(running, { step, known: percent, at: performance.now() });
  if (again) running.percent = 0;
  const now = lines[working] ? `${lines[working].dataset.name} is running` : "writing the file";
  say(`${name}${step} of ${steps} steps: ${now}.`);
  return tick();
}

// Show the time, and a percentage that moves between the events as the estimate has it.
function tick() {
  if (!running) return;
  const { item, start, began, known = 0, at = start, question } = running;
  const total = estimates.get(question)?.seconds;
  const now = performance.now();
  const guess = began && total ? known + (now - at) / (10 * total) : known;
  running.percent = item.percent = Math.max(running.percent, Math.min(guess, Math.max(known, 97)));
  const left = began && total ? total - (now - began) / 1000 : 0;
  $("progress").value = running.percent;
  $("elapsed").textContent = [
    `${Math.floor(running.percent)}%`,
    `${Math.floor((now - start) / 1000)} s`,
    ...(left >= 1 ? [`about ${span(left)} left`] : []),
  ].join(" · ");
  describeRow(item);
}

const STATES = { waiting: "waiting", working: "running", done: "done", idle: "no steps" };

function mark(line, state, words = STATES[state]) {
  line.dataset.state = state;
  line.lastChild.textContent = words;
}

// The result

async function finish(item, result) {
  const first = !item.result;
  Object.assign(item, { result, state: "done", percent: 100 });
  if (selected !== item) return report(item);
  await presentResult();
  if (first) compare.reveal();
  return report(item);
}

function report(item) {
  const { timing, steps, seed, scale, drawn, width } = item.result;
  const all = Object.values(timing).reduce((sum, time) => sum + time, 0);
  const count = steps === 1 ? "1 step" : `${steps} steps`;
  const resampled = item.width && width !== even(item.width * scale)
    ? ` The model worked at ${number(scale)}×; its result was resampled.` : "";
  const unseen = drawn === false ? " This browser cannot show the result; download it." : "";
  showTimes(item.result);
  say(`${nameIn(item)}Done in ${measured(all)} with ${count} and seed ${seed}.${resampled}${unseen}`);
}

function showTimes({ timing }) {
  for (const line of $("experts").children) {
    const time = timing[line.dataset.name];
    if (time === undefined) mark(line, "idle");
    else mark(line, "done", measured(time));
  }
}

async function downloadAll() {
  const done = items.filter(({ result }) => result);
  save(await zip(done.map(({ result }) => [result.filename, result.blob])), "upscaled.zip");
}

// Cropping

function startCropping() {
  const item = selected;
  const { width, height } = item.original;
  const { pixels, output_pixels: results } = server.limits;
  const most = Math.min(pixels, results / wanted ** 2, 0.64 * width * height);
  clear();
  crop.begin(width, height, item.crop ?? crop.middle(width, height, most), show);
  present();
  $("rectangle").focus();
}

// Leave the photo as it was before.
function leaveCropping() {
  crop.end();
  present();
}

async function useWhole() {
  if (selected.crop) await replace(selected, selected.original, null);
  else leaveCropping();
}

async function useCrop() {
  const { x, y, width, height } = crop.rectangle();
  const file = await cut(selected.original.file, { x, y, width, height }, selected.kind !== "jpeg");
  await replace(selected, { file, width, height }, { x, y, width, height });
}

async function replace(item, part, rectangle) {
  crop.end();
  Object.assign(item, part, { crop: rectangle, result: null, problem: null, state: "ready" });
  drawThumbnail(item.row.querySelector("canvas"), await draw(item.file));
  if (selected === item) present();
}

// Problems, each shown beside its cause

const CAUSES = { 400: "file", 401: "token", 413: "file", 415: "file" };
// The next photo would meet the same refusal.
const STOPS = [401, 422, 503, undefined];

function fail(item, error, signal) {
  item.state = "cancelled";
  if (item.result) showTimes(item.result);
  say(signal.aborted ? "Cancelled." : "");
  if (signal.aborted) return;
  const field = error.status === 422 && /^\w+(?=:)/.exec(error.message)?.[0];
  const named = CAUSES[error.status] ?? field;
  const cause = $(`${named}-problem`) ? named : "start";
  if (cause === "token") $("token-field").hidden = false;
  Object.assign(item, { state: "failed", problem: [cause, inWords(error)] });
  const stops = STOPS.includes(error instanceof Problem ? error.status : undefined);
  if (stops) for (const other of items) if (other.state === "queued") other.state = "ready";
  if (selected === item || stops) complain(cause, inWords(error));
}

function complain(id, words) {
  $(`${id}-problem`).textContent = words;
  if (!$(id).closest(".field")) return;
  $("more").open ||= $("more").contains($(id));
  $(id).setAttribute("aria-invalid", "true");
  $(id).focus();
}

function clear() {
  for (const line of document.querySelectorAll(".problem:not(#limit-problem)")) line.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
  }
}

// The view

function show() {
  const held = document.activeElement;
  const item = selected;
  const result = item?.result;
  const rectangle = crop.rectangle();
  const drawn = Boolean(item?.width);
  const compared = Boolean(drawn && result?.drawn && !rectangle);
  const usable = pending();
  const visible = {
    drop: !item,
    top: item,
    compare: drawn || result?.drawn,
    before: drawn,
    after: result?.drawn && !rectangle,
    blank: item && item.state !== "reading" && !drawn && !result?.drawn,
    bar: item,
    zooms: result?.drawn && !rectangle,
    start: !queue && !rectangle,
    cancel: queue && !rectangle,
    download: result && items.length === 1 && item.state !== "running" && !rectangle,
    cropping: server && drawn && !["running", "queued"].includes(item.state) && !rectangle,
    use: rectangle,
    whole: rectangle,
    run: running || (result && !rectangle),
    photos: items.length > 1,
    zip: items.filter((other) => other.result).length > 1,
  };
  for (const [id, is] of Object.entries(visible)) $(id).hidden = !is;
  $("compare").classList.toggle("compared", compared);
  $("start").disabled = !usable.length;
  setText("limit-problem", item && !rectangle ? obstacle(item) : "");
  if (!running && result) showTimes(result);
  label();
  showScale();
  for (const other of items) describeRow(other);
  resize();
  ask();
  if (!held.hidden && !held.closest("[hidden]")) return;
  // The focused element is hidden now: focus the next one.
  const after = queue ? "cancel" : compared ? "slider" : "download";
  $($(after).hidden ? "start" : after).focus();
}

function resize() {
  compare.setSize(...outcome());
}

function outcome() {
  const item = selected;
  if (!item) return [0, 0];
  if (crop.rectangle()) return [item.original.width * wanted, item.original.height * wanted];
  if (item.result) return [item.result.width, item.result.height];
  const scale = scaleOf(item);
  return [even(item.width * scale), even(item.height * scale)];
}

const FORMATS = {
  "image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WebP", "image/tiff": "TIFF",
};

function label() {
  const item = selected;
  setText("advice", advice());
  if (!item) return;
  setText("name", item.file.name);
  setText("size", sizes(item));
  setText("count", tally());
  const some = pending();
  const again = !queue && some.length > 0 && !some.some(isOpen);
  const which = items.length > 1 && some.length ? `Upscale ${photos(some.length)}` : "Upscale";
  setText("start", again ? `${which} again` : which);
  $("start").classList.toggle("main", !again);
  for (const id of ["download", "zip"]) $(id).classList.toggle("main", again);
  setText("cancel", items.length > 1 ? "Cancel all" : "Cancel");
  setText("blank",
    `This browser cannot show ${item.file.name}. If it is a photo, it can still be upscaled.`);
}

function sizes(item) {
  const part = crop.rectangle();
  if (part) {
    const { width, height } = item.original;
    const scale = scaleOf(part);
    return `${part.width} × ${part.height} of ${width} × ${height} → ${even(part.width * scale)} × ${even(part.height * scale)}`;
  }
  const [width, height] = outcome();
  const from = item.width ? `${item.width} × ${item.height}` : bytes(item.file.size);
  const type = item.result ? `, ${FORMATS[item.result.media_type]} ${bytes(item.result.blob.size)}` : "";
  return from + (width ? ` → ${width} × ${height}` : "") + type;
}

// Return what to know before the start.
function advice() {
  const part = crop.rectangle();
  if (part) {
    const pixels = part.width * part.height;
    return server && pixels > server.limits.pixels
      ? `This part has ${megapixels(pixels)}, and this server takes at most ${megapixels(server.limits.pixels)}.`
      : "The part keeps every pixel, as PNG in sRGB. The camera's data (EXIF) is left out.";
  }
  if (!selected || running) return "";
  const less = items.length === 1 ? reduction(selected) : "";
  return [less, pending().some(isOpen) ? forecast() : ""].filter(Boolean).join(" ");
}

function tally() {
  const done = items.filter(({ state }) => state === "done").length;
  return done ? `${done} of ${photos(items.length)} done` : photos(items.length);
}

// With one photo, the field shows the scale that it gets.
function showScale() {
  const only = items.length === 1 ? items[0] : null;
  for (const preset of document.getElementsByName("preset")) {
    preset.disabled = Boolean(server && only?.width && preset.value > 1 && !admits(only, preset.value));
  }
  if ($("scale").validity.valid && document.activeElement !== $("scale")) {
    $("scale").value = only ? scaleOf(only) : wanted;
  }
  checkPreset();
}

function checkPreset() {
  for (const preset of document.getElementsByName("preset")) {
    preset.checked = Number(preset.value) === $("scale").valueAsNumber;
  }
}

const ROW_STATES = {
  reading: () => "",
  ready: (item) => forecastOf(item),
  queued: () => "waiting",
  running: (item) => `${Math.floor(item.percent)}%`,
  done: (item) => `done, ${bytes(item.result.blob.size)}`,
  failed: (item) => item.problem[1],
  cancelled: () => "cancelled",
};

function forecastOf(item) {
  const time = secondsOf([item]);
  return time ? `about ${span(time)}` : "";
}

function describeRow(item) {
  const { row, state } = item;
  const trouble = obstacle(item);
  const scale = item.width ? `${number(scaleOf(item))}×` : "";
  const words = trouble || [scale, ROW_STATES[state](item)].filter(Boolean).join(", ");
  const busy = ["running", "queued"].includes(state);
  setContent(row.querySelector("small"), words);
  row.classList.toggle("bad", Boolean(trouble) || state === "failed");
  row.querySelector(".pick").setAttribute("aria-current", item === selected);
  row.querySelector(".save").hidden = !item.result || busy;
  const remover = row.querySelector(".remove");
  setContent(remover, "×");
  remover.setAttribute("aria-label", `${busy ? "Cancel" : "Remove"} ${item.file.name}`);
  const bar = row.querySelector("progress");
  bar.hidden = state !== "running";
  bar.value = item.percent;
  bar.setAttribute("aria-label", `Progress of ${item.file.name}`);
}

// Screen readers would repeat a text that is set again.
function setContent(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

const setText = (id, words) => setContent($(id), words);
const say = (words) => setText("status", words);

// Events

const on = (id, event, act) => $(id).addEventListener(event, act);

for (const id of ["file", "folder"]) {
  on(id, "change", ({ target }) => {
    add([...target.files], id === "folder");
    // Otherwise the same file could not be chosen again.
    target.value = "";
  });
}
on("form", "submit", (event) => {
  event.preventDefault();
  start();
});
// Ignore the second click of a double click on the start button, which stood in the same place.
on("cancel", "click", ({ detail }) => detail < 2 && queue.abort());
on("cropping", "click", startCropping);
on("use", "click", useCrop);
on("whole", "click", useWhole);
on("rectangle", "keydown", ({ key }) => {
  if (key === "Enter") useCrop();
  if (key === "Escape") leaveCropping();
});
on("zip", "click", downloadAll);
on("clear", "click", removeAll);
on("scales", "input", ({ target }) => {
  if (target !== $("scale")) $("scale").value = target.value;
  if ($("scale").validity.valid) wanted = $("scale").valueAsNumber;
  checkPreset();
});
on("detail", "input", () => ($("detail-value").value = $("detail").value));
on("steps", "input", () => ($("steps-range").value = $("steps").value));
on("steps-range", "input", () => ($("steps").value = $("steps-range").value));
// On every input, because a button that moves when a field is left misses the click that leaves it.
for (const event of ["input", "change"]) on("settings", event, show);
on("drop", "click", ({ target }) => target.closest("label") ?? $("file").click());
if (!("webkitdirectory" in $("folder"))) {
  for (const control of document.querySelectorAll("#folder, .folder")) control.remove();
}

addEventListener("resize", resize);
addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) add([...clipboardData.files]);
});
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", async (event) => {
  document.body.classList.remove("dragging");
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  const several = event.dataTransfer.items.length > 1;
  const files = await dropped(event.dataTransfer);
  add(files, several || files.length > 1);
});

load();
