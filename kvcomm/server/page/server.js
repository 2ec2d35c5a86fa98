// Asking the server, as the tenant whose key this tab has.

const KEY = "kvcomm.key";

/** No answer that could be shown; anything else that is thrown is a mistake of this page. */
class Refused extends Error {
  constructor(message, status = 0, waitMs = 0) {
    super(message);
    this.status = status;
    this.waitMs = waitMs;
  }
}

function unreachable() {
  throw new Refused("the server does not answer");
}

/** A response that is a success; throws `Refused`. */
async function request(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { authorization: `Bearer ${key}` };
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["content-type"] = "application/json";
  }
  const response = await fetch(path, options).catch(unreachable);
  if (response.ok) return response;
  const { error } = await response.json().catch(unreachable);
  throw new Refused(error.message, response.status, 1000 * Number(response.headers.get("retry-after") ?? 0));
}

/** JSON; throws `Refused`. */
async function ask(path) {
  const response = await request(path);
  return response.json().catch(unreachable);
}

/** The events of a streamed answer as they come, up to its end; throws `Refused`, also where it breaks off. */
async function* streamed(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) throw new Refused("the answer broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data: "))) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}
