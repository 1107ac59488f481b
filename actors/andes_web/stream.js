// One streamed chat over server-sent events. No dependencies; ES module.

/** Objects of a server-sent event stream, until [DONE] or its end; bytes may split anywhere. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length === 0) continue;
        const text = data.map((line) => line.slice(5).trim()).join("\n");
        if (text === "[DONE]") return;
        yield JSON.parse(text);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Ask and yield arrays of text tokens as they arrive.
 * @param {object} chat {model, messages, max_tokens, ttft_s, tds, key, signal}.
 * @throws {Error} what the endpoint said, in one line.
 */
export async function* chatTokens(chat) {
  const headers = { "Content-Type": "application/json" };
  if (chat.key) headers.Authorization = `Bearer ${chat.key}`;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers,
    signal: chat.signal,
    body: JSON.stringify({
      model: chat.model,
      messages: chat.messages,
      max_tokens: chat.max_tokens,
      temperature: 0,
      stream: true,
      vllm_xargs: { qoe_ttft_s: chat.ttft_s, qoe_tds: chat.tds, qoe_tenant: "page" },
    }),
  });
  if (!response.ok) throw new Error(await problemOf(response));
  for await (const event of readEvents(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const tokens = (event.choices ?? []).map((choice) => choice.delta?.content).filter(Boolean);
    if (tokens.length > 0) yield tokens;
  }
}

/** What a refused request was told, and when to come back. */
async function problemOf(response) {
  const retry = response.headers.get("Retry-After");
  let message = response.statusText;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an answer in OpenAI's form: its status must do
  }
  return `${response.status}: ${message}${retry ? `, try again in ${retry} s` : ""}`;
}
