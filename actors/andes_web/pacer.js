// The token pacer for browsers: bursts and pauses go in, a steady stream no faster than reading
// comes out. Andes (arXiv 2404.16283), client-side token buffer. Twin of
// raysys/serving/andes/pacer.py: both pass the same golden vectors. No dependencies; ES module.

const STALL_S = 1e-3;
const MAX_RECORD = 100_000;

/** QoE of one stream, O(1) per delivery: the lag behind the ideal line and its sum. */
export class QoETracker {
  constructor({ ttft_s = 1.0, tds = 4.8 } = {}, submitted_s = 0) {
    if (!(tds > 0 && tds <= 1000)) throw new RangeError(`tds: expected (0, 1000], got ${tds}`);
    if (!(ttft_s >= 0 && ttft_s <= 3600)) {
      throw new RangeError(`ttft_s: expected [0, 3600], got ${ttft_s}`);
    }
    this.ttft_s = ttft_s;
    this.tau_s = 1 / tds;
    this.submitted_s = submitted_s;
    this.tokens = 0;
    this.lag_s = 0;
    this.delay_sum_s = 0;
    this.last_s = 0;
  }

  /** k visible tokens were delivered together at time t. */
  onToken(t, k = 1) {
    if (k <= 0) return;
    const since = Math.max(t - this.submitted_s, this.last_s);
    this.last_s = since;
    this.lag_s = Math.max(this.lag_s, since - this.ttft_s - this.tokens * this.tau_s);
    this.delay_sum_s += k * this.lag_s;
    this.tokens += k;
  }

  /** Score as if the answer ended with the last delivered token; 0 before the first. */
  qoe() {
    const n = this.tokens;
    if (n === 0) return 0;
    const whole = (n * n * this.tau_s) / 2 + n * this.lag_s;
    return Math.min(1, Math.max(0, 1 - this.delay_sum_s / whole));
  }

  /** Seconds of delivered text not yet read at t; negative: the reader waits. */
  bufferS(t) {
    return this.ttft_s + this.tokens * this.tau_s + this.lag_s - (t - this.submitted_s);
  }
}

/** Never reorders, loses, duplicates or merges tokens; two are never closer than tau. */
export class Pacer {
  /**
   * @param {object} spec {ttft_s, tds}: the reader's targets.
   * @param {object} options {submitted_s, mode: "eager"|"anchored", flush: "paced"|"now",
   *     max_buffer}. All times are seconds on one monotonic clock (performance.now() / 1000).
   */
  constructor(spec = {}, options = {}) {
    const { submitted_s = 0, mode = "eager", flush = "paced", max_buffer = 100_000 } = options;
    if (mode !== "eager" && mode !== "anchored") throw new RangeError(`mode: got ${mode}`);
    if (flush !== "paced" && flush !== "now") throw new RangeError(`flush: got ${flush}`);
    if (!(max_buffer >= 1)) throw new RangeError(`max_buffer: expected >= 1, got ${max_buffer}`);
    this.tracker = new QoETracker(spec, submitted_s);
    this.submitted_s = submitted_s;
    this.shown = 0;
    this._anchored = mode === "anchored";
    this._flushNow = flush === "now";
    this._maxBuffer = max_buffer;
    this._queue = [];
    this._head = 0;
    this._ended = false;
    this._free_s = null; // when the reader is done with the last shown token
    this._record = { delivered_s: [], shown_s: [], depth: [] };
    this._stalls = 0;
    this._stall_s = 0;
    this._longest_s = 0;
    this._unshown = 0;
  }

  get buffered() {
    return this._queue.length - this._head;
  }

  /** Whether the caller should stop reading the stream for now. */
  get full() {
    return this.buffered >= this._maxBuffer;
  }

  /** The stream ended and everything was shown (or dropped). */
  get done() {
    return this._ended && this.buffered === 0;
  }

  /** Tokens arrived together; each takes weight * tau to read. Ignored after the end. */
  push(tokens, now_s, weight = 1) {
    if (this._ended) return;
    for (const token of tokens) {
      this._queue.push([token, now_s, weight]);
      this.tracker.onToken(now_s);
      keep(this._record.delivered_s, now_s - this.submitted_s);
    }
    keep(this._record.depth, [now_s - this.submitted_s, this.buffered]);
  }

  /** When the next token is to be shown, or null while there is none. */
  dueS() {
    if (this.buffered === 0) return null;
    const arrived = this._queue[this._head][1];
    if (this._ended && this._flushNow) return arrived;
    if (this._free_s !== null) return Math.max(arrived, this._free_s);
    return this._anchored ? Math.max(arrived, this.submitted_s + this.tracker.ttft_s) : arrived;
  }

  /** Tokens to show at now: none before the due time, one, or all on a flush. */
  show(now_s) {
    const due = this.dueS();
    if (due === null || now_s < due) return [];
    if (this._ended && this._flushNow) {
      const tokens = this._queue.slice(this._head).map((entry) => entry[0]);
      this._drop();
      for (let i = 0; i < tokens.length; i++) this._mark(now_s);
      return tokens;
    }
    const [token, , weight] = this._queue[this._head++];
    if (this._head > 1024 && this._head * 2 > this._queue.length) {
      this._queue = this._queue.slice(this._head);
      this._head = 0;
    }
    if (this._free_s !== null) this._countStall(due - this._free_s);
    // A timer that wakes a little late must not slow the stream down: keep the due time.
    const at = now_s - due < this.tracker.tau_s ? due : now_s;
    this._free_s = at + weight * this.tracker.tau_s;
    this._mark(at);
    return [token];
  }

  /** The stream is complete; what is left is still shown. */
  end() {
    this._ended = true;
  }

  /** The reader leaves: drop the buffer; returns how many tokens were shown. */
  cancel() {
    this._ended = true;
    this._unshown += this.buffered;
    this._drop();
    return this.shown;
  }

  report() {
    return {
      delivered_s: [...this._record.delivered_s],
      shown_s: [...this._record.shown_s],
      depth: [...this._record.depth],
      stalls: this._stalls,
      stall_s: this._stall_s,
      longest_stall_s: this._longest_s,
      unshown: this._unshown,
      qoe: this.tracker.qoe(),
    };
  }

  _drop() {
    this._queue = [];
    this._head = 0;
  }

  _mark(at_s) {
    this.shown += 1;
    keep(this._record.shown_s, at_s - this.submitted_s);
  }

  _countStall(seconds) {
    if (seconds <= STALL_S) return;
    this._stalls += 1;
    this._stall_s += seconds;
    this._longest_s = Math.max(this._longest_s, seconds);
  }
}

/** Pieces of about a word each whose concatenation is the text; 1.3 tokens apiece. */
export function splitWords(text) {
  return text.match(/\s*\S+\s*|\s+/g) ?? [];
}

/**
 * Wrap an async iterable of token chunks so that its tokens come out at reading pace.
 * A failing stream still shows what arrived, then throws; leaving the loop early cancels it.
 */
export async function* paced(chunks, pacer, clock = () => performance.now() / 1000) {
  const source = chunks[Symbol.asyncIterator]();
  let pull = null;
  let result = null;
  let failure = null;
  let ended = false;
  try {
    while (!(ended && pacer.done)) {
      if (pull === null && !ended && !pacer.full) {
        pull = source.next().then(
          (value) => (result = { value }),
          (error) => (result = { error }),
        );
      }
      const due = pacer.dueS();
      const now = clock();
      if (due !== null && now >= due) {
        yield* pacer.show(now);
      } else {
        let timer = null;
        const waits = pull === null ? [] : [pull];
        if (due !== null) {
          waits.push(new Promise((wake) => (timer = setTimeout(wake, (due - now) * 1000))));
        }
        await Promise.race(waits);
        clearTimeout(timer);
      }
      if (result !== null) {
        if (result.error !== undefined) failure = result.error;
        ended = failure !== null || result.value.done;
        if (ended) pacer.end();
        else pacer.push(result.value.value, clock());
        pull = result = null;
      }
    }
  } finally {
    if (!pacer.done) pacer.cancel();
    if (!ended && source.return) source.return();
  }
  if (failure !== null) throw failure;
}

function keep(list, item) {
  if (list.length < MAX_RECORD) list.push(item);
}
