// Quantities in words, and sizes as the server rounds them.

// Round to the nearest whole number, and halves to the even one, as the server does.
export const even = (x) => (x % 2 === 0.5 ? Math.floor(x) : Math.round(x));
export const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
export const megapixels = (pixels) => `${number(pixels / 1e6)} megapixels`;
export const photos = (count) => (count === 1 ? "1 photo" : `${count} photos`);

export function bytes(n) {
  if (n < 1e3) return `${n} bytes`;
  return n < 1e6 ? `${number(n / 1e3)} kB` : `${number(n / 1e6)} MB`;
}

// A measured time, in milliseconds.
export function measured(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms < 1e5 ? `${(ms / 1000).toFixed(1)} s` : span(ms / 1000);
}

// A time that is known roughly, in seconds.
export function span(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  return `${number(seconds / 3600)} hours`;
}

// Make a sentence of a server's message.
export const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}`.replace(/\.?$/, ".");
