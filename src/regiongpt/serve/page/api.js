/** Talks to the server that the page came from; docs/serve.md describes its API. */

/** An answer that is no success, or none at all (status 0). */
export class ApiError extends Error {
  /** @param {number} status @param {{message?: string, code?: string | null}} [error] */
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.code = error?.code ?? "";
  }
}

/** Asks the person for a key; the app sets it. Resolves to "" when they give none. */
export const keys = { ask: async () => "" };

/**
 * GET without a body; else POST, a Blob as it is and anything else as JSON. Resolves to the response of a success.
 * @param {string} path @param {object} [body] @param {AbortSignal} [signal] @returns {Promise<Response>}
 */
export async function call(path, body, signal) {
  const blob = body instanceof Blob;
  const key = sessionStorage.getItem("key");
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: {
      ...(body && { "Content-Type": blob ? "application/octet-stream" : "application/json" }),
      ...(key && { Authorization: `Bearer ${key}` }),
    },
    body: blob ? body : (body && JSON.stringify(body)) || null,
    signal: signal ?? null,
  }).catch((error) => {
    throw signal?.aborted ? error : new ApiError(0, { message: "the server cannot be reached" });
  });
  if (response.ok) return response;
  const given = response.status === 401 && (await keys.ask());
  if (!given) throw new ApiError(response.status, (await response.json().catch(() => ({}))).error);
  sessionStorage.setItem("key", given);
  return call(path, body, signal);
}

/** The events of a streamed answer. @param {string} path @param {object} body @param {AbortSignal} signal */
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true }, signal);
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = (await reader?.read()) ?? { done: true };
    const lines = (text + (value ?? "")).split("\n");
    text = lines.pop() ?? "";
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(200, event.error);
      yield event;
    }
    if (done) throw new ApiError(0, { message: "the answer broke off" });
  }
}
