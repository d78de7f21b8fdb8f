// Decode what the server sends: events from the body of a response, and bytes from base64.

// Yield server-sent events as [name, data]. `EventSource` cannot be used: it sends no photo.
export async function* events(body) {
  let name = "message";
  let data = [];
  for await (const line of lines(body)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "event") name = value;
    if (field === "data") data.push(value);
    if (line !== "") continue;
    if (data.length) yield [name, JSON.parse(data.join("\n"))];
    name = "message";
    data = [];
  }
}

// A result is one line of many megabytes, so its pieces are joined only once.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = [];
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const [end, ...starts] = chunk.value.split("\n");
    pieces.push(end);
    for (const start of starts) {
      yield pieces.join("").replace(/\r$/, "");
      pieces = [start];
    }
  }
}

// Decode in slices, to avoid a second string of the whole; `slice` is a multiple of four.
export function bytesOf(base64, slice = 2 ** 20) {
  const parts = [];
  for (let start = 0; start < base64.length; start += slice) {
    const text = atob(base64.slice(start, start + slice));
    const part = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) part[i] = text.charCodeAt(i);
    parts.push(part);
  }
  return parts;
}
