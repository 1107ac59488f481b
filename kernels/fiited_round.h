// Adjustment: a whole round with its exact threshold, a slice of the continuous mode, compaction.
#pragma once

#include "fiited_scan.h"

namespace fiited {

// How many to grow and to evict: never more than the exchange needs or the churn cap allows.
struct Exchange { i64 grow, evict; };
inline Exchange exchange_size(i64 alive, i64 target, i64 growers, i64 victims, i64 churn) {
  const i64 room = std::max<i64>(0, target - alive);
  const i64 surplus = std::max<i64>(0, alive - target);
  const i64 swaps = std::min({std::max<i64>(0, growers - room), churn, std::max<i64>(0, victims - surplus)});
  return {std::min(growers, surplus ? swaps : room + swaps), std::min(victims, surplus + swaps)};
}

inline i64 target_slots(const Store& s) {
  i64 slots = s.c.slots;
  if (s.c.budget_bytes) {   // what the index takes is not available to chunks
    const i64 index = s.directory->mapped_bytes() + s.sketch->bytes() + 2 * s.c.page_bytes;
    slots = std::min(slots, std::max<i64>(0, s.c.budget_bytes - index) / s.chunk_bytes);
  }
  return slots - i64(double(slots) * s.c.slack);
}

inline void next_round(Store& s) {
  ++s.round;
  s.scale /= double(s.c.gamma);
  if (s.scale <= 0x1p60) return;
  s.scale *= 0x1p-60;   // an exact power of two: the ranking cannot change
  s.directory->for_each([&](Segment& g) {
    const size_t n = s.directory->capacity(g) * s.c.max_chunks;
    for (size_t i = 0; i < n; ++i) g.utils[i] *= 0x1p-60f;
  });
  s.sketch->rescale(0x1p-60f);
  s.cut.score *= s.cut.score > 0 ? 0x1p-60f : 1.0f;
  std::fill(s.window.begin(), s.window.end(), 0.0f);
  s.window_weight = 0;
}

// Carries out what the surveys and the queue ask for, as far as the budget and the churn cap allow.
// `cuts`: one, or one per table.
inline void exchange(Store& s, Desk& desk, const std::vector<Cut>& cuts, i64 target, i64 churn, u64 salt) {
  Moves &growers = desk.growers, &victims = desk.victims;
  for (const Candidate& q : s.queue)
    if (cuts[cuts.size() > 1 ? q.table : 0].below(q.score, tie_of(q.key, q.table, salt, 0)))
      growers.add({q.key, nullptr, 0, 0, q.score, q.table, u16(kAdmit | 1)});
  const Exchange x = exchange_size(s.alive, target, growers.chunks, victims.chunks, churn);
  keep<false>(desk.listed, victims, x.evict, salt);
  keep<true>(desk.listed, growers, x.grow, salt);
  by_row(victims.rows, 0, victims.rows.size());
  evict_rows(s, victims.rows);
  if (growers.chunks > s.free_slots()) {
    const i64 room = std::max<i64>(0, s.free_slots());
    s.n.refused += growers.chunks - room;
    keep<true>(desk.listed, growers, room, salt);
  }
  auto is_queued = [](const Move& m) { return bool(m.bits & kAdmit); };   // they are in order already
  const Move* const queued = std::find_if(growers.rows.begin(), growers.rows.end(), is_queued);
  by_row(growers.rows, 0, size_t(queued - growers.rows.begin()));
  grow_rows(s, growers.rows);
  s.queue.clear();
}

inline void full_round(Store& s, Desk& desk) {
  unique_queue(s);
  const i64 target = target_slots(s);
  const u64 salt = mix(s.c.seed + s.round);
  const i64 churn = std::max<i64>(1, i64(s.c.churn_cap * double(s.c.slots)));
  desk.clear(s.c.max_chunks);
  Listed& listed = desk.listed;
  std::vector<Cut> cuts;
  i64 weight = 0;
  for (const TableConfig& t : s.tables) weight += t.dense_rows;
  for (int t = 0; t < (s.c.by_table ? s.c.tables : 1); ++t) {
    Range range;
    i64 share = target;
    if (s.c.by_table) {
      range.table = t;
      share = weight ? i64(double(target) * double(s.tables[t].dense_rows) / double(weight)) : target / s.c.tables;
    }
    const size_t first = listed.rows.size();
    cuts.push_back(exact_cut(s, range, share, salt, listed));
    survey(s, listed, first, cuts.back(), salt, desk.growers, desk.victims);
  }
  if (!s.c.by_table) s.cut = cuts[0];
  exchange(s, desk, cuts, target, churn, salt);
  desk.leave();
}

// Continuous mode: one slice of the key space per step; the threshold comes from the decayed
// histogram of the latest slices, which are random samples of the rows because keys are hashed.
inline void slice(Store& s, Desk& desk, i64 slices) {
  const i64 index = s.step % slices;
  if (index == 0 && s.step) next_round(s);
  const u64 width = ~u64(0) / u64(slices);
  Range range{width * u64(index), index + 1 == slices ? ~u64(0) : width * u64(index + 1) - 1, -1};
  constexpr float keep = 0.9f;
  for (float& bin : s.window) bin *= keep;
  s.window_weight = s.window_weight * keep + 1.0 / double(slices);
  desk.clear(s.c.max_chunks);
  list_any(s, range, {0, kBins}, desk.listed);
  for (const float score : desk.listed.scores) s.window[bits_of(std::fabs(score)) >> 16] += bits_of(score) ? 1.0f : 0.0f;
  const i64 target = target_slots(s);
  const double want = double(target) * s.window_weight;
  double above = 0;
  s.cut = {};
  int top = kBins - 1;
  while (top > 0 && s.window[top] == 0.0f) --top;
  for (int b = top; b >= 0; --b) {
    above += s.window[b];
    if (above > want) { s.cut = {float_of((u32(b) << 16) | 0xffff), ~u64(0)}; break; }
  }
  unique_queue(s);
  const u64 salt = mix(s.c.seed + s.round);
  survey(s, desk.listed, 0, s.cut, salt, desk.growers, desk.victims);
  const i64 churn = std::max<i64>(1, i64(4.0 * s.c.churn_cap * double(s.c.slots) / double(slices)));
  exchange(s, desk, {s.cut}, target, churn, salt);
  desk.leave();
}

// Move rows out of the emptiest page of every class, up to `limit` rows; returns how many moved.
inline i64 compact(Store& s, const Range& range, i64 limit) {
  const int classes = s.c.layout == kSlabs ? s.c.max_chunks : 1;
  u32 page[kMaxChunks + 1];
  bool any = false;
  for (int m = 1; m <= classes; ++m) {
    page[m] = s.pool->draining(m);
    if (page[m] != kNoSlot && !s.pool->fuller_page_exists(page[m], m)) page[m] = kNoSlot;
    any |= page[m] != kNoSlot;
  }
  i64 moved = 0;
  if (!any) return 0;
  s.directory->for_range(range.low, range.high, [&](Segment& g, size_t begin, size_t end, bool whole) {
    for (size_t i = begin; i < end && moved < limit; ++i) {
      if (g.tags[i] & 0x80) continue;
      Entry& e = g.entries[i];
      if (!whole && (e.key < range.low || e.key > range.high)) continue;
      const int len = popcount(e.alive & kAliveMask);
      for (int j = 0; j < (s.c.layout == kSlabs ? 1 : s.c.max_chunks); ++j) {
        if (s.c.layout == kChunked && !(e.alive >> j & 1)) continue;
        const int m = s.c.layout == kSlabs ? len : 1;
        u32& slot = s.c.layout == kSlabs ? e.slot : g.refs[i * s.c.max_chunks + j];
        if (!m || page[m] == kNoSlot || s.pool->page_of(slot) != page[m]) continue;
        const u32 fresh = s.pool->alloc(m);
        if (fresh == kNoSlot) continue;
        if (s.pool->page_of(fresh) == page[m]) { s.pool->free(fresh, m); continue; }
        std::memcpy(s.pool->at(fresh, m), s.pool->at(slot, m), s.pool->bytes(m));
        s.pool->free(slot, m);
        slot = fresh;
        ++moved;
        if (s.pool->draining(m) != page[m]) page[m] = kNoSlot;
      }
    }
  });
  if (moved) ++s.directory->version;   // weights have moved: open batches look their rows up again
  return moved;
}

}  // namespace fiited
