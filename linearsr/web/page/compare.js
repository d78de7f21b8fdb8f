// Compare both pictures: a slider between them, zoom and panning.

const $ = (id) => document.getElementById(id);
const compare = $("compare");
const pan = $("pan");

// How many pixels of the screen a pixel of the result takes; 0 fits the result into the page.
let zoom = 0;

// The photo takes the space of its result, so that nothing jumps when that arrives.
export function setSize(width, height) {
  compare.style.setProperty("--w", width);
  compare.style.setProperty("--h", height);
  compare.style.setProperty("--dpr", devicePixelRatio);
}

export function setZoom(value) {
  const middle = centre();
  zoom = value;
  for (const choice of document.getElementsByName("zoom")) {
    choice.checked = Number(choice.value) === zoom;
  }
  pan.hidden = zoom === 0;
  compare.classList.toggle("zoomed", zoom > 0);
  compare.style.setProperty("--zoom", zoom);
  pan.scrollTo(
    middle.x * pan.scrollWidth - pan.clientWidth / 2,
    middle.y * pan.scrollHeight - pan.clientHeight / 2,
  );
  panned();
}

// The point of the picture in the middle of the frame, as shares of its width and height.
function centre() {
  if (!pan.scrollWidth) return { x: 0.5, y: 0.5 };
  return {
    x: (pan.scrollLeft + pan.clientWidth / 2) / pan.scrollWidth,
    y: (pan.scrollTop + pan.clientHeight / 2) / pan.scrollHeight,
  };
}

function panned() {
  compare.style.setProperty("--x", pan.scrollLeft);
  compare.style.setProperty("--y", pan.scrollTop);
}

function slide() {
  const { value } = $("slider");
  compare.style.setProperty("--at", `${value}%`);
  $("slider").setAttribute("aria-valuetext", `${value}% before, ${100 - value}% after`);
}

export function centreSlider() {
  $("slider").value = 50;
  compare.classList.remove("reveal");
  slide();
}

// Reveal the first result of a photo with a wipe.
export function reveal() {
  compare.classList.remove("reveal");
  compare.style.setProperty("--at", "100%");
  // Reading the style applies it; otherwise the transition would begin at its end.
  getComputedStyle(compare).getPropertyValue("--at");
  $("slider").value = 50;
  compare.classList.add("reveal");
  slide();
}

// Keys that zoom while the slider or the picture has the focus.
const KEYS = { 0: 0, 1: 1, 2: 2 };

compare.addEventListener("keydown", ({ key, ctrlKey, metaKey, altKey }) => {
  if (ctrlKey || metaKey || altKey || $("zooms").hidden || !(key in KEYS)) return;
  setZoom(KEYS[key]);
});
$("slider").addEventListener("input", () => {
  compare.classList.remove("reveal");
  slide();
});
$("zooms").addEventListener("input", ({ target }) => setZoom(Number(target.value)));
pan.addEventListener("scroll", panned);
pan.addEventListener("pointermove", (event) => {
  if (event.buttons !== 1 || event.pointerType !== "mouse") return;
  pan.scrollBy(-event.movementX, -event.movementY);
});
