// A rectangle over the photo, which mouse, finger and keyboard draw, move and resize.

const $ = (id) => document.getElementById(id);
const surface = $("crop");
const frame = $("rectangle");
const SMALLEST = 16;

// Null unless the user crops: { rectangle, width, height, changed }, in pixels of the photo.
let work = null;

// changed: called with every new rectangle.
export function begin(width, height, rectangle, changed) {
  work = { width, height, changed };
  surface.hidden = false;
  set(rectangle);
}

export function end() {
  work = null;
  surface.hidden = true;
}

export const rectangle = () => work?.rectangle;

// Return the largest rectangle of these proportions with at most so many pixels, in the middle.
export function middle(width, height, pixels) {
  const shrink = Math.min(1, Math.sqrt(pixels / (width * height)));
  const [w, h] = [Math.floor(width * shrink), Math.floor(height * shrink)];
  return { x: (width - w) >> 1, y: (height - h) >> 1, width: w, height: h };
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));

function set({ x, y, width, height }) {
  const most = work;
  width = clamp(Math.round(width), Math.min(SMALLEST, most.width), most.width);
  height = clamp(Math.round(height), Math.min(SMALLEST, most.height), most.height);
  x = clamp(Math.round(x), 0, most.width - width);
  y = clamp(Math.round(y), 0, most.height - height);
  work.rectangle = { x, y, width, height };
  const share = { left: x / most.width, top: y / most.height,
    width: width / most.width, height: height / most.height };
  for (const [side, value] of Object.entries(share)) frame.style[side] = `${100 * value}%`;
  work.changed(work.rectangle);
}

// Return the rectangle with these opposite corners.
function between(a, b) {
  const x = clamp(Math.min(a.x, b.x), 0, work.width);
  const y = clamp(Math.min(a.y, b.y), 0, work.height);
  const right = clamp(Math.max(a.x, b.x), 0, work.width);
  const bottom = clamp(Math.max(a.y, b.y), 0, work.height);
  return { x, y, width: right - x, height: bottom - y };
}

function pointOf({ clientX, clientY }) {
  const box = surface.getBoundingClientRect();
  return {
    x: ((clientX - box.left) / box.width) * work.width,
    y: ((clientY - box.top) / box.height) * work.height,
  };
}

// Return how a pointer that went down here changes the rectangle: a function of where it is.
function gesture(target, start) {
  const { x, y, width, height } = work.rectangle;
  const corner = target.dataset.corner;
  if (corner) {
    const opposite = { x: corner.includes("w") ? x + width : x,
      y: corner.includes("n") ? y + height : y };
    return (point) => between(opposite, point);
  }
  if (target === frame) {
    return (point) => ({ x: x + point.x - start.x, y: y + point.y - start.y, width, height });
  }
  return (point) => between(start, point);
}

surface.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  frame.focus();
  const change = gesture(event.target, pointOf(event));
  surface.setPointerCapture(event.pointerId);
  const move = (moved) => set(change(pointOf(moved)));
  const stop = () => surface.removeEventListener("pointermove", move);
  surface.addEventListener("pointermove", move);
  for (const ending of ["pointerup", "pointercancel"]) {
    surface.addEventListener(ending, stop, { once: true });
  }
});

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

frame.addEventListener("keydown", (event) => {
  const arrow = ARROWS[event.key];
  if (!arrow) return;
  event.preventDefault();
  const step = event.altKey ? 1 : Math.max(1, Math.round(work.width / 100));
  const [dx, dy] = arrow.map((direction) => direction * step);
  const { x, y, width, height } = work.rectangle;
  set(event.shiftKey
    ? { x, y, width: Math.min(width + dx, work.width - x), height: Math.min(height + dy, work.height - y) }
    : { x: x + dx, y: y + dy, width, height });
});
