// Runs the golden vectors against actors/andes_web/pacer.js; exits non-zero on a difference.
// node andes_pacer_check.mjs PACER_JS VECTORS_JSON
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import assert from "node:assert/strict";

const [, , modulePath, vectorsPath] = process.argv;
const { Pacer, QoETracker, paced, splitWords } = await import(pathToFileURL(modulePath).href);
const vectors = JSON.parse(readFileSync(vectorsPath, "utf8"));

function close(actual, expected, what) {
  assert.ok(Math.abs(actual - expected) < 1e-6, `${what}: ${actual} is not ${expected}`);
}

function wake(due, tick) {
  return tick === 0 ? due : Math.max(due, Math.ceil(Number((due / tick).toFixed(9))) * tick);
}

function play(vector) {
  const pacer = new Pacer(vector.spec, vector.options);
  const shown = [];
  const until = (limit) => {
    for (let due = pacer.dueS(); due !== null && wake(due, vector.tick_s) < limit; ) {
      const tokens = pacer.show(wake(due, vector.tick_s));
      shown.push(...tokens);
      due = pacer.dueS();
    }
  };
  for (const [at, tokens] of vector.arrivals) {
    until(at);
    pacer.push(tokens, at, vector.weight);
  }
  if (vector.cancel_s !== null) {
    until(vector.cancel_s);
    pacer.cancel();
  } else {
    until(vector.end_s);
    pacer.end();
    if (vector.options.flush === "now") shown.push(...pacer.show(vector.end_s));
    until(Infinity);
  }
  return { shown, report: pacer.report(), pacer };
}

for (const vector of vectors) {
  const { shown, report, pacer } = play(vector);
  const { expected, name } = vector;
  assert.deepEqual(shown, expected.shown.map((entry) => entry[1]), name);
  expected.shown.forEach(([at], i) =>
    close(report.shown_s[i] + vector.options.submitted_s, at, `${name}: token ${i}`),
  );
  close(report.qoe, expected.qoe, `${name}: qoe`);
  close(report.stall_s, expected.stall_s, `${name}: stall_s`);
  close(report.longest_stall_s, expected.longest_stall_s, `${name}: longest_stall_s`);
  assert.equal(report.stalls, expected.stalls, name);
  assert.equal(report.unshown, expected.unshown, name);
  assert.ok(pacer.done, name);
}

// The async wrapper: order kept, errors after the text, words survive splitting, bad specs fail.
async function* broken() {
  yield ["a", "b"];
  yield [];
  yield ["c"];
  throw new Error("connection lost");
}
const seen = [];
await assert.rejects(async () => {
  const pacer = new Pacer({ ttft_s: 0, tds: 1000 }, { submitted_s: performance.now() / 1000 });
  for await (const token of paced(broken(), pacer)) seen.push(token);
}, /connection lost/);
assert.deepEqual(seen, ["a", "b", "c"]);
const text = "  To be, or\nnot — ünï 🙂 ";
assert.equal(splitWords(text).join(""), text);
assert.throws(() => new QoETracker({ tds: 0 }), RangeError);
assert.throws(() => new Pacer({}, { mode: "loud" }), RangeError);
console.log(`${vectors.length} vectors agree`);
