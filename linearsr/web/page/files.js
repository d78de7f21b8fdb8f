// Find the pictures among files, and read what the page shows of them.

// The first bytes of each kind, as Latin-1. The server looks at the same bytes, not at the name.
const KINDS = {
  png: /^\x89PNG/,
  jpeg: /^\xff\xd8\xff/,
  webp: /^RIFF....WEBP/s,
  tiff: /^(II[*+]\0|MM\0[*+])/,
  avif: /^....ftypavi[fs]/s,
  gif: /^GIF8/,
  bmp: /^BM/,
  jp2: /^(\0\0\0\x0cjP {2}|\xff\x4f\xff\x51)/,
  heic: /^....ftyp(hei|hev|mif1|msf1)/s,
};

// Return the kind of a picture, or undefined for other files and for folders.
export async function kindOf(file) {
  const start = await file.slice(0, 16).arrayBuffer().catch(() => new ArrayBuffer(0));
  const text = String.fromCharCode(...new Uint8Array(start));
  return Object.keys(KINDS).find((kind) => KINDS[kind].test(text));
}

// Return the files of a drop, with those inside of folders.
export async function dropped(transfer) {
  const files = [...transfer.files];
  // The browser empties `transfer` when this event is over: take the entries before any await.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return files;
  const found = [];
  for (const entry of entries) for await (const file of walk(entry)) found.push(file);
  return found;
}

async function* walk(entry) {
  if (entry.isFile) {
    yield await new Promise((resolve, reject) => entry.file(resolve, reject));
    return;
  }
  const reader = entry.createReader();
  const read = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  // A reader gives a hundred entries at most, and none at the end.
  for (let some = await read(); some.length; some = await read()) {
    for (const child of some) if (isVisible(child)) yield* walk(child);
  }
}

// Names that begin with a dot are litter of file managers.
export const isVisible = ({ name }) => !name.startsWith(".");

// Return the picture as the browser draws it, upright; null if it cannot.
export async function draw(file) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  } finally {
    // The element keeps what it has loaded.
    URL.revokeObjectURL(url);
  }
}

// Fill a small canvas with the middle of the picture.
export function drawThumbnail(canvas, image) {
  const { naturalWidth: width, naturalHeight: height } = image;
  const side = Math.min(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, (width - side) / 2, (height - side) / 2, side, side,
    0, 0, canvas.width, canvas.height);
}

// Return a part of a picture as a PNG file, which keeps every pixel but no EXIF.
// alpha: whether the picture may be transparent.
export async function cut(file, { x, y, width, height }, alpha) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  canvas.getContext("2d", { alpha }).drawImage(await draw(file), x, y, width, height, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], file.name.replace(/(\.[^.]*)?$/, "-crop.png"), { type: "image/png" });
}

// Offer a blob for download.
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  // Browsers may begin to read only after the click.
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
