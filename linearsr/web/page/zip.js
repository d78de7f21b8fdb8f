// Write a zip file. Its entries are stored as they are, because pictures are compressed already; a
// blob of blobs refers to its parts, so that no picture is copied into the memory of this page.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

// files: [name, blob] each, less than 4 GB in all.
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of unique(files)) {
    const path = new TextEncoder().encode(name);
    const about = [...stamp(new Date()), [4, await checksum(blob)], [4, blob.size], [4, blob.size],
      [2, path.length], [2, 0]];
    // Version 2.0, names in UTF-8, no compression.
    const local = record([4, 0x04034b50], [2, 20], [2, 0x0800], [2, 0], ...about);
    parts.push(local, path, blob);
    directory.push(record([4, 0x02014b50], [2, 20], [2, 20], [2, 0x0800], [2, 0], ...about,
      [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]), path);
    offset += local.length + path.length + blob.size;
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const count = directory.length / 2;
  const end = record([4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, length],
    [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

// Give files of one name numbers: a.png, a (2).png.
function unique(files) {
  const taken = new Set();
  return files.map(([name, blob]) => {
    const [, stem, suffix] = /^(.*?)(\.[^.]*)?$/s.exec(name);
    let free = name;
    for (let n = 2; taken.has(free.toLowerCase()); n++) free = `${stem} (${n})${suffix ?? ""}`;
    taken.add(free.toLowerCase());
    return [free, blob];
  });
}

function record(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

function stamp(date) {
  const time = (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1);
  const day = ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  return [[2, time], [2, day]];
}

async function checksum(blob) {
  let crc = -1;
  const reader = blob.stream().getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    for (const byte of value) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  }
  return ~crc >>> 0;
}
