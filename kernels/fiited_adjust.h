// Adjustment: histogram of scores, exact threshold with ties broken by hash, eviction and growth.
// The same pieces serve a whole round, one slice of the continuous mode, and a round over shards.
#pragma once

#include <unordered_map>

#include "fiited_core.h"

namespace fiited {

struct Range { u64 low = 0, high = ~u64(0); int table = -1; };

// Scores E of the k chunks of a row from its utilities; true where the row has any.
inline bool row_scores(const Store& s, const float* u, float weight, float* score) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  float low = INFINITY;
  u32 any = 0;
  for (int j = 0; j < s.c.max_chunks; ++j) {
    any |= bits_of(u[j]);
    const float size = std::fabs(u[j]) * weight;
    float e = std::signbit(u[j]) ? size * bonus : size;
    if (prefix) { low = std::min(low, e); e = low; }
    score[j] = e;
  }
  return any != 0;
}

inline u64 tie_of(u64 v, u16 table, u64 salt, int j) {
  return (mix(v ^ mix(salt + table)) & ~u64(15)) | u64(15 - j);
}

inline bool equal_weights(const Store& s) {
  for (const TableConfig& t : s.tables) if (t.weight != 1.0f) return false;
  return true;
}

// Call f(segment, index, scores) for every row of the range with a non-zero utility or memory.
template <class F> inline void each_scored(const Store& s, const Range& range, F f) {
  const bool plain = equal_weights(s) && range.table < 0;
  float score[kMaxChunks];
  s.directory->for_range(range.low, range.high, [&](Segment& g, size_t begin, size_t end, bool whole) {
    const bool check = !whole || !plain;
    for (size_t i = begin; i < end; ++i) {
      const float* u = g.utils + i * s.c.max_chunks;
      float weight = 1.0f;
      if (check) {
        if (g.tags[i] & 0x80) continue;
        const Entry& e = g.entries[i];
        if (e.key < range.low || e.key > range.high) continue;
        if (range.table >= 0 && e.table != range.table) continue;
        weight = s.tables[e.table].weight;
      }
      if (row_scores(s, u, weight, score)) f(g, i, u, score);
    }
  });
}

inline bool counted(const float* u, const float* score, int j) { return std::signbit(u[j]) || score[j] > 0; }

inline void unique_queue(Store& s) {   // keep the latest estimate of a row queued more than once
  std::vector<Candidate>& q = s.queue;
  std::stable_sort(q.begin(), q.end(), [](const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key < b.key : a.table < b.table;
  });
  size_t n = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    if (i + 1 < q.size() && q[i + 1].key == q[i].key && q[i + 1].table == q[i].table) continue;
    if (!s.directory->find(q[i].key, q[i].table).entry) q[n++] = q[i];
  }
  q.resize(n);
}

template <class T> inline void histogram(const Store& s, const Range& range, bool with_queue, T* bins) {
  each_scored(s, range, [&](Segment&, size_t, const float* u, const float* score) {
    for (int j = 0; j < s.c.max_chunks; ++j)
      if (counted(u, score, j)) bins[bits_of(score[j]) >> 16] += 1;
  });
  if (with_queue)
    for (const Candidate& q : s.queue)
      if (range.table < 0 || q.table == range.table) bins[bits_of(q.score) >> 16] += 1;
}

// All (score, tie) pairs whose score falls into one histogram bin.
inline void collect(const Store& s, const Range& range, u32 bin, u64 salt, std::vector<std::pair<float, u64>>& out) {
  each_scored(s, range, [&](Segment& g, size_t i, const float* u, const float* score) {
    for (int j = 0; j < s.c.max_chunks; ++j)
      if (counted(u, score, j) && bits_of(score[j]) >> 16 == bin)
        out.emplace_back(score[j], tie_of(g.entries[i].key, g.entries[i].table, salt, j));
  });
  for (const Candidate& q : s.queue)
    if ((range.table < 0 || q.table == range.table) && bits_of(q.score) >> 16 == bin)
      out.emplace_back(q.score, tie_of(q.key, q.table, salt, 0));
}

// Call f(segment, index, scores, j, grows) for every chunk that the cut wants to change.
template <class F> inline void each_change(const Store& s, const Range& range, const Cut& cut, u64 salt, F f) {
  each_scored(s, range, [&](Segment& g, size_t i, const float* u, const float* score) {
    u32 alive = 0, want = 0;
    for (int j = 0; j < s.c.max_chunks; ++j) {
      const bool is_alive = std::signbit(u[j]);
      alive |= u32(is_alive) << j;
      if (score[j] < cut.score || (score[j] <= 0 && !is_alive)) continue;
      if (score[j] > cut.score || tie_of(g.entries[i].key, g.entries[i].table, salt, j) > cut.tie) want |= 1u << j;
    }
    if (want == alive) return;
    const Entry& e = g.entries[i];
    const bool safe = (alive & ~want) && ((e.alive & kPinned) || int(u16(s.round - e.grown)) <= s.c.min_alive);
    for (u32 m = want ^ alive; m; m &= m - 1) {
      const int j = __builtin_ctz(m);
      if (want >> j & 1) f(g, i, score, j, true);
      else if (!safe) f(g, i, score, j, false);
    }
  });
}

// Bounds on what plan() lists: growers from a histogram bin upwards, victims up to one.
struct Bounds { u32 grow_from = 0, evict_to = kBins; };

// Lists the chunks that the cut wants to change, within bounds: fills s.growers and s.victims.
inline void plan(Store& s, const Range& range, const Cut& cut, u64 salt, const Bounds& bounds = {}) {
  each_change(s, range, cut, salt, [&](Segment& g, size_t i, const float* score, int j, bool grows) {
    const u32 bin = bits_of(score[j]) >> 16;
    if (grows ? bin < bounds.grow_from : bin > bounds.evict_to) return;
    const Entry& e = g.entries[i];
    (grows ? s.growers : s.victims).push_back({score[j], tie_of(e.key, e.table, salt, j), e.key, e.table, u16(j), false});
  });
  for (const Candidate& q : s.queue) {
    const u64 tie = tie_of(q.key, q.table, salt, 0);
    if ((range.table < 0 || q.table == range.table) && cut.below(q.score, tie) && bits_of(q.score) >> 16 >= bounds.grow_from)
      s.growers.push_back({q.score, tie, q.key, q.table, 0, true});
  }
}

// Keep the n best (or worst), in the order in which they are listed: rows stay together.
template <class Before> inline void keep_first(std::vector<Item>& items, size_t n, Before before) {
  if (items.size() <= n) return;
  if (n == 0) { items.clear(); return; }
  struct Rank { float score; u64 tie; };
  std::vector<Rank> ranks;
  ranks.reserve(items.size());
  for (const Item& item : items) ranks.push_back({item.score, item.tie});
  std::nth_element(ranks.begin(), ranks.begin() + (n - 1), ranks.end(), before);
  const Rank last = ranks[n - 1];
  size_t kept = 0;
  for (const Item& item : items)
    if (kept < n && !before(last, Rank{item.score, item.tie})) items[kept++] = item;
  items.resize(kept);
}
inline void keep_best(std::vector<Item>& items, size_t n) {
  keep_first(items, n, [](const auto& a, const auto& b) { return a.score != b.score ? a.score > b.score : a.tie > b.tie; });
}
inline void keep_worst(std::vector<Item>& items, size_t n) {
  keep_first(items, n, [](const auto& a, const auto& b) { return a.score != b.score ? a.score < b.score : a.tie < b.tie; });
}

inline void by_row(std::vector<Item>& items) {
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return a.key != b.key ? a.key < b.key : a.table != b.table ? a.table < b.table : a.chunk < b.chunk;
  });
}

// Runs of items of the same row, as one bitmap each.
template <class F> inline void each_run(const std::vector<Item>& items, F f) {
  for (size_t i = 0; i < items.size();) {
    size_t end = i;
    u16 bits = 0;
    for (; end < items.size() && items[end].key == items[i].key && items[end].table == items[i].table; ++end)
      bits |= u16(1u << items[end].chunk);
    f(items[i], bits);
    i = end;
  }
}

// Largest prefix inside a bitmap (layout B), or the bitmap itself.
inline u16 closed(const Store& s, u16 bits) { return s.c.layout == kChunked ? bits : u16(bits & ~(bits + 1)); }

// Evict s.victims, then grow s.growers, within the pool's bound. Both lists are consumed.
inline void apply_plan(Store& s) {
  by_row(s.victims);
  each_run(s.victims, [&](const Item& item, u16 bits) {
    Found f = s.directory->find(item.key, item.table);
    if (!f.entry) return;
    const u16 want = closed(s, u16(f.entry->alive & kAliveMask & ~bits));
    s.set_alive(f, want, false);
    if (!want) s.remove(f);
  });
  const i64 room = std::max<i64>(0, s.free_slots());
  if (i64(s.growers.size()) > room) { s.n.refused += i64(s.growers.size()) - room; keep_best(s.growers, size_t(room)); }
  by_row(s.growers);
  each_run(s.growers, [&](const Item& item, u16 bits) {
    Found f = s.directory->find(item.key, item.table);
    if (f.entry) s.set_alive(f, closed(s, u16((f.entry->alive | bits) & kAliveMask)), false);
    else if (item.admit) s.admit(item.key, item.table, 1, item.score / s.tables[item.table].weight);
  });
  s.growers.clear();
  s.victims.clear();
}

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
    slots = std::min(slots, std::max<i64>(0, s.c.budget_bytes - index) / (i64(s.c.chunk) * 4 * (1 + s.states)));
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

inline Cut exact_cut(const Store& s, const Range& range, i64 target, u64 salt) {
  std::vector<i64> bins(kBins, 0);
  histogram(s, range, true, bins.data());
  i64 above = 0;
  for (int b = kBins - 1; b >= 0; --b) {
    if (above + bins[b] <= target) { above += bins[b]; continue; }
    std::vector<std::pair<float, u64>> members;
    members.reserve(size_t(bins[b]));
    collect(s, range, u32(b), salt, members);
    const size_t need = size_t(target - above);
    std::nth_element(members.begin(), members.begin() + need, members.end(), std::greater<>());
    return {members[need].first, members[need].second};
  }
  return {};
}

// Where the exchange of a whole round ends, by bins: a round that swaps a few percent must not list
// every chunk that would like to move.
struct Survey { Exchange exchange; Bounds bounds; };
inline Survey survey(const Store& s, const Cut& cut, u64 salt, i64 target, i64 churn) {
  std::vector<i64> grow(kBins, 0), evict(kBins, 0);
  i64 growers = 0, victims = 0;
  each_change(s, {}, cut, salt, [&](Segment&, size_t, const float* score, int j, bool grows) {
    ++(grows ? grow : evict)[bits_of(score[j]) >> 16];
    ++(grows ? growers : victims);
  });
  for (const Candidate& q : s.queue)
    if (cut.below(q.score, tie_of(q.key, q.table, salt, 0))) { ++grow[bits_of(q.score) >> 16]; ++growers; }
  Survey found{exchange_size(s.alive, target, growers, victims, churn), {}};
  u32 from = kBins, to = 0;
  for (i64 sum = 0; from > 0 && sum < found.exchange.grow;) sum += grow[--from];
  for (i64 sum = evict[0]; to + 1 < kBins && sum < found.exchange.evict;) sum += evict[++to];
  found.bounds = {from, to};
  return found;
}

inline void full_round(Store& s) {
  unique_queue(s);
  const i64 target = target_slots(s);
  const u64 salt = mix(s.c.seed + s.round);
  const i64 churn = std::max<i64>(1, i64(s.c.churn_cap * double(s.c.slots)));
  Exchange x;
  if (s.c.by_table) {
    i64 weight = 0;
    for (const TableConfig& t : s.tables) weight += t.dense_rows;
    for (int t = 0; t < s.c.tables; ++t) {
      Range range; range.table = t;
      const i64 share = weight ? i64(double(target) * double(s.tables[t].dense_rows) / double(weight)) : target / s.c.tables;
      plan(s, range, exact_cut(s, range, share, salt), salt);
    }
    x = exchange_size(s.alive, target, i64(s.growers.size()), i64(s.victims.size()), churn);
  } else {
    s.cut = exact_cut(s, {}, target, salt);
    const Survey found = survey(s, s.cut, salt, target, churn);
    x = found.exchange;
    if (x.grow || x.evict) plan(s, {}, s.cut, salt, found.bounds);
  }
  keep_best(s.growers, size_t(x.grow));
  keep_worst(s.victims, size_t(x.evict));
  apply_plan(s);
  s.queue.clear();
}

// Continuous mode: one slice of the key space per step; the threshold comes from the decayed
// histogram of the latest slices, which are random samples of the rows because keys are hashed.
inline void slice(Store& s, i64 slices) {
  const i64 index = s.step % slices;
  if (index == 0 && s.step) next_round(s);
  const u64 width = ~u64(0) / u64(slices);
  Range range{width * u64(index), index + 1 == slices ? ~u64(0) : width * u64(index + 1) - 1, -1};
  constexpr float keep = 0.9f;
  for (float& bin : s.window) bin *= keep;
  s.window_weight = s.window_weight * keep + 1.0 / double(slices);
  histogram(s, range, false, s.window.data());
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
  plan(s, range, s.cut, salt);
  const i64 churn = std::max<i64>(1, i64(4.0 * s.c.churn_cap * double(s.c.slots) / double(slices)));
  const Exchange x = exchange_size(s.alive, target, i64(s.growers.size()), i64(s.victims.size()), churn);
  keep_best(s.growers, size_t(x.grow));
  keep_worst(s.victims, size_t(x.evict));
  apply_plan(s);
  s.queue.clear();
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
        std::memcpy(s.pool->at(fresh, m), s.pool->at(slot, m), size_t(m) * s.c.chunk * 4 * (1 + s.states));
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
