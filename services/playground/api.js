// Winnow's API, as any client calls it. Addresses are relative, so that the page works below a path.
const KEY = "winnow-key";
const GONE = "The service does not answer.";
const SENDABLE = /^[\x20-\xff]*$/; // what a header may have

class Problem extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

// An error as the API words it, with the parameter that it names.
function problemOf(error, status) {
  const where = error.param && !error.message.includes(error.param) ? ` (${error.param})` : "";
  return new Problem(`${error.message}${where}`, { status, param: error.param });
}

async function call(path, { body, signal } = {}) {
  const headers = body ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key && !SENDABLE.test(key))
    throw new Problem("the API key has a character that no key can have", { status: 401 });
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(GONE);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  if (told?.error?.message) throw problemOf(told.error, response.status);
  throw new Problem(`The service answers ${response.status} ${response.statusText}.`, {
    status: response.status,
  });
}

async function fetchCard() {
  return (await (await call("v1/models")).json()).data[0];
}

// The objects of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "",
    ended = false;
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") {
          ended = true;
          continue;
        }
        const event = JSON.parse(line.slice(6));
        if (event.error) throw problemOf(event.error, 0);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem(`${GONE} The answer above is not complete.`);
  }
  if (!ended) throw new Problem("The stream broke off. The answer above is not complete.");
}

// Asks and streams one answer.  take: called with { text } or { thought } as it comes.
// Returns what the answer ended with: { finish_reason, usage }.
async function ask(card, { prompt, maxTokens, winnow, salt, signal }, take) {
  const chats = card.winnow?.chat ?? true;
  const body = {
    model: card.id,
    temperature: 0,
    max_tokens: maxTokens,
    stream: true,
    stream_options: { include_usage: true },
    winnow,
    ...(chats ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    ...(salt ? { cache_salt: salt } : {}),
  };
  const found = { finish_reason: null, usage: null };
  const response = await call(chats ? "v1/chat/completions" : "v1/completions", { body, signal });
  for await (const event of events(response)) {
    const [choice] = event.choices ?? [];
    const thought = choice?.delta?.reasoning_content,
      text = choice?.delta?.content ?? choice?.text;
    if (thought) take({ thought });
    if (text) take({ text });
    found.finish_reason = choice?.finish_reason ?? found.finish_reason;
    found.usage = event.usage ?? found.usage;
  }
  return found;
}
