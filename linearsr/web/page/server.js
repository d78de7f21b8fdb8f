// Requests to the server, and its refusals in plain words.

import { bytesOf, events } from "./stream.js";
import { sentence } from "./words.js";

export class Problem extends Error {
  constructor(status, detail, wait) {
    super(detail);
    Object.assign(this, { status, wait });
  }
}

// Return the model, the limits and whether a token is needed.
export async function describe() {
  const response = await fetch("v1/models");
  if (!response.ok) throw await refusal(response);
  const { data: [model], limits, token } = await response.json();
  return { model, limits, token };
}

// Return how long a picture will take and whether the server takes it; null if it does not say.
export async function estimate(query, signal) {
  const response = await fetch(`v1/estimate?${query}`, { signal });
  return response.ok ? response.json() : null;
}

// Upscale a picture; return the server's result with its bytes as a blob. A busy server is asked
// again. `told` gets the seconds to wait as { wait }, and the progress events.
export async function upscale(body, token, signal, told) {
  const headers = { Accept: "text/event-stream", ...authorisation(token) };
  let response = await fetch("v1/upscale", { method: "POST", body, headers, signal });
  while (response.status === 429) {
    const wait = Number(response.headers.get("Retry-After")) || 2;
    told({ wait });
    await sleep(1000 * wait, signal);
    response = await fetch("v1/upscale", { method: "POST", body, headers, signal });
  }
  if (!response.ok) throw await refusal(response);
  for await (const [name, data] of events(response.body)) {
    if (name === "progress") told(data);
    if (name === "error") throw new Problem(data.status, data.detail);
    if (name === "result") {
      const blob = new Blob(bytesOf(data.image), { type: data.media_type });
      return { ...data, image: null, blob };
    }
  }
  throw new TypeError("the stream ended before the result");
}

const authorisation = (token) => (token ? { Authorization: `Bearer ${token}` } : {});

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

async function refusal(response) {
  const { status, statusText, headers } = response;
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail || `the server answered ${status} ${statusText}`;
  return new Problem(status, detail, headers.get("Retry-After"));
}

export function inWords(error) {
  if (!(error instanceof Problem)) {
    return "The server does not answer; check the connection and try again.";
  }
  if (error.status === 401) return "The access token is missing or wrong.";
  // The message is shown beside the field or photo that it names.
  return sentence(error.message.replace(/^(the picture|\w+): /, ""));
}
