// The page: chats side by side, delivery curves, the service's QoE, and bursts.

import { drawLines, staircase } from "./chart.js";
import { Pacer, paced } from "./pacer.js";
import { chatTokens } from "./stream.js";

const $ = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const POLL_MS = 1000;
const DRAW_MS = 200;
const SPEEDS = [4.8, 3.3, 6.5, 10];
const SERIES_S = 300;

let service = null;

/** One conversation: its panel, its history, and the stream under way. */
class Pane {
  constructor(index) {
    this.element = $("pane").content.firstElementChild.cloneNode(true);
    this.find = (name) => this.element.querySelector(name);
    this.find("h2").textContent = `Reader ${index + 1}`;
    this.find(".tds").value = SPEEDS[index % SPEEDS.length];
    this.find(".tds").setAttribute("aria-label", `reading speed of reader ${index + 1}, tokens/s`);
    this.history = [];
    this.abort = null;
    this.pacer = null;
    this.spec = { ttft_s: 1, tds: SPEEDS[index % SPEEDS.length] };
    this.draw(0);
  }

  get busy() {
    return this.abort !== null;
  }

  async ask(prompt) {
    if (this.busy) return;
    this.spec = { ttft_s: Number($("ttft").value), tds: Number(this.find(".tds").value) };
    this.abort = new AbortController();
    this.pacer = new Pacer(this.spec, { submitted_s: clock() });
    this.find(".raw").textContent = this.find(".paced").textContent = "";
    this.say("waiting for the first word");
    const timer = setInterval(() => this.refresh(), DRAW_MS);
    let failure = null;
    this.history.push({ role: "user", content: prompt });
    try {
      for await (const token of paced(this.arriving(), this.pacer, clock)) {
        append(this.find(".paced"), token);
      }
    } catch (error) {
      failure = error.name === "AbortError" ? "stopped" : error.message;
    }
    clearInterval(timer);
    this.history.push({ role: "assistant", content: this.find(".raw").textContent });
    if (failure !== null) this.history.length -= 2; // a failed turn is not part of the talk
    this.abort = null;
    this.refresh(failure);
  }

  async *arriving() {
    const chat = {
      model: service.model,
      messages: this.history,
      max_tokens: Number($("tokens").value),
      key: $("key").value,
      signal: this.abort.signal,
      ...this.spec,
    };
    for await (const tokens of chatTokens(chat)) {
      for (const token of tokens) append(this.find(".raw"), token);
      yield tokens;
    }
  }

  /** The reader leaves: what is not read yet is dropped, and the endpoint is told. */
  stop() {
    if (!this.busy) return;
    this.pacer.cancel();
    this.abort.abort();
  }

  say(text, failed = false) {
    this.find(".outcome").textContent = text;
    this.find(".outcome").classList.toggle("failed", failed);
  }

  refresh(failure = null) {
    const report = this.pacer.report();
    const since = clock() - this.pacer.submitted_s;
    this.draw(this.busy ? since : Math.max(...report.shown_s, 0), report);
    if (failure !== null) return this.say(failure, failure !== "stopped");
    const first = report.delivered_s[0];
    if (first === undefined) return this.say(`waiting for ${since.toFixed(1)} s`);
    const stalls = report.stalls ? `, ${report.stalls} waits of ${report.stall_s.toFixed(1)} s` : "";
    const unread = this.busy ? `, ${this.pacer.buffered} tokens unread` : "";
    this.say(`QoE ${report.qoe.toFixed(3)}, first word after ${first.toFixed(2)} s${stalls}${unread}`);
  }

  draw(now, report = { delivered_s: [], shown_s: [] }) {
    const { ttft_s, tds } = this.spec;
    const count = Math.max(20, report.delivered_s.length * 1.1);
    const end = Math.max(now, ttft_s + 4);
    const reached = Math.min(count, Math.max(0, (end - ttft_s) * tds));
    const top = Math.max(count, 1);
    drawLines(this.find(".curve"), {
      xMax: end,
      yMax: top,
      yName: "tokens",
      xName: "seconds",
      lines: [
        { kind: "expected", name: "expected", points: [[ttft_s, 0], [ttft_s + reached / tds, reached]] },
        { kind: "arrived", name: "arrived", points: staircase(report.delivered_s) },
        { kind: "shown", name: "shown", points: staircase(report.shown_s) },
      ],
    });
  }
}

/** Add text and keep the end in sight, unless the reader scrolled up. */
function append(node, text) {
  const atEnd = node.scrollHeight - node.scrollTop - node.clientHeight < 30;
  node.append(text);
  if (atEnd) node.scrollTop = node.scrollHeight;
}

let panes = [];

function setPanes() {
  const wanted = Math.min(4, Math.max(1, Number($("streams").value) || 1));
  for (const gone of panes.splice(wanted)) {
    gone.stop();
    gone.element.remove();
  }
  while (panes.length < wanted) {
    const pane = new Pane(panes.length);
    panes.push(pane);
    $("panes").append(pane.element);
  }
}

function ask() {
  const prompt = $("prompt").value.trim() || $("prompt").placeholder;
  if (service === null) return;
  $("prompt").value = "";
  for (const pane of panes) pane.ask(prompt);
}

async function startBurst() {
  const policy = document.querySelector("input[name=policy]:checked").value;
  const body = { policy, chats: Number($("chats").value), tds: Number($("bursttds").value) };
  const response = await fetch("qoe/bursts", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization() },
    body: JSON.stringify(body),
  });
  const answer = await response.json();
  $("loadnote").textContent = response.ok ? "" : answer.error.message;
  await poll();
}

function authorization() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function poll() {
  let note = null;
  try {
    const response = await fetch("qoe", { headers: authorization() });
    $("keyfield").hidden = response.status !== 401 && !$("key").value;
    if (response.ok) {
      service = await response.json();
      showService();
    } else {
      note = response.status === 401 ? "this endpoint wants an API key" : `the endpoint answers ${response.status}`;
    }
  } catch {
    note = "the endpoint does not answer";
  }
  if (note !== null) $("figures").textContent = note;
}

function showService() {
  $("model").textContent = service.model;
  const series = service.series;
  const last = series.at(-1) ?? { qoe: 1, live: 0, behind: 0 };
  $("figures").textContent =
    `QoE ${last.qoe.toFixed(3)} over the last 30 s, ${last.live} ${last.live === 1 ? "stream" : "streams"}` +
    `${last.live ? `, ${Math.round(100 * last.behind)} % behind` : ""}, ${service.refused} refused`;
  const ago = series.map((point) => ({ ...point, x: point.t - service.now_s }));
  const busiest = Math.max(1, ...ago.map((point) => point.live));
  drawLines($("series"), {
    xMin: -SERIES_S,
    xMax: 0,
    yMax: 1,
    yName: "QoE",
    xName: "seconds ago",
    width: 1160,
    height: 150,
    xText: (value) => String(-value),
    lines: [
      { kind: "live", name: `streams (of ${busiest})`, points: ago.map((p) => [p.x, p.live / busiest]) },
      { kind: "shown", name: "QoE of the readers", points: ago.map((p) => [p.x, p.qoe]) },
    ],
  });
  showBursts();
}

function showBursts() {
  const running = service.bursts.some((burst) => burst.running);
  $("burst").disabled = running || !service.bursts_allowed;
  $("policies").disabled = !service.bursts_allowed;
  if (service.policy !== "andes") {
    document.querySelector("input[value=fcfs]").checked = true;
    $("policies").disabled = true;
  }
  if (!service.bursts_allowed) $("loadnote").textContent = "Bursts are off here: raysys serve --set page=full";
  $("bursts").hidden = service.bursts.length === 0;
  const number = (value, digits) => (value === null ? "" : value.toFixed(digits));
  const rows = service.bursts.toReversed().map((burst) => {
    const row = document.createElement("tr");
    const cells = [
      burst.policy === "andes" ? "Andes" : "order of arrival",
      `${burst.done} of ${burst.chats}`,
      number(burst.mean_qoe, 3),
      number(burst.worst_qoe, 3),
      burst.ttft_s === null ? "" : `${number(burst.ttft_s, 2)} s`,
      `${burst.seconds.toFixed(1)} s${burst.running ? " so far" : ""}`,
    ];
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  });
  $("bursts").tBodies[0].replaceChildren(...rows);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("stop").addEventListener("click", () => panes.forEach((pane) => pane.stop()));
$("streams").addEventListener("change", setPanes);
$("load").addEventListener("submit", (event) => {
  event.preventDefault();
  startBurst();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") panes.forEach((pane) => pane.stop());
  if (event.altKey && event.code === "KeyB") {
    event.preventDefault();
    if (!$("burst").disabled) startBurst();
  }
});

setPanes();
poll();
setInterval(poll, POLL_MS);
