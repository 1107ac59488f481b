// Pieces of an adjustment: histogram of scores, members of one bin, lists of what to grow and evict.
// They serve a whole round, one slice of the continuous mode, and a round over shards.
#pragma once

#include <unordered_map>

#include "fiited_core.h"

namespace fiited {

struct Range { u64 low = 0, high = ~u64(0); int table = -1; };

// The scores of four chunks at once, by the same products and minima as one by one.
inline v4 scores_of_four(i4 bits, float weight, float bonus, bool prefix) {
  const v4 ones = {1.0f, 1.0f, 1.0f, 1.0f}, more = ones * bonus, none = {INFINITY, INFINITY, INFINITY, INFINITY};
  v4 e = reinterpret_cast<v4>(bits & 0x7fffffff) * weight * (bits < 0 ? more : ones);
  if (!prefix) return e;
  const v4 one = __builtin_shufflevector(e, none, 4, 0, 1, 2);
  e = e < one ? e : one;
  const v4 two = __builtin_shufflevector(e, none, 4, 5, 0, 1);
  return e < two ? e : two;
}

// Scores E of the k chunks of a row from its utilities; true where the row has any.
inline bool row_scores(const Store& s, const float* u, float weight, float* score) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  if (s.c.max_chunks == 4) {
    const i4 bits = *reinterpret_cast<const i4*>(u);
    *reinterpret_cast<v4*>(score) = scores_of_four(bits, weight, bonus, prefix);
    return any_bit(bits);
  }
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
  float score[kMaxChunks + 1];
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

// Sorts what is nearly in order in linear time, and keeps the order of equals.
template <class T, class Before> inline void sort_nearly(T* begin, T* end, Before before) {
  const size_t limit = 32 * size_t(end - begin);
  size_t moves = 0;
  for (T* at = begin; at != end; ++at) {
    if (at == begin || !before(*at, at[-1])) continue;
    const T item = *at;
    T* to = at;
    for (; to != begin && before(item, to[-1]); --to, ++moves) *to = to[-1];
    *to = item;
    if (moves > limit) { std::stable_sort(begin, end, before); return; }
  }
}

// By row, the order of appearance inside a row: keys are hashes, so their upper 24 bits in two passes
// of a radix sort leave little to do.
inline void sort_queue(std::vector<Candidate>& q) {
  std::vector<Candidate> other(q.size());
  for (const int shift : {40, 52}) {
    std::vector<u32> at(4097, 0);
    for (const Candidate& c : q) ++at[(c.key >> shift & 4095) + 1];
    for (int b = 0; b < 4096; ++b) at[b + 1] += at[b];
    for (const Candidate& c : q) other[at[c.key >> shift & 4095]++] = c;
    q.swap(other);
  }
  sort_nearly(q.data(), q.data() + q.size(), [](const Candidate& a, const Candidate& b) {
    return a.key != b.key ? a.key < b.key : a.table < b.table;
  });
}

inline void unique_queue(Store& s) {   // keep the latest estimate of a row queued more than once
  std::vector<Candidate>& q = s.queue;
  sort_queue(q);
  size_t n = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    if (i + 16 < q.size()) __builtin_prefetch(s.directory->tag_line(q[i + 16].key));
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

// Call f(segment, index, pattern of the four utilities, four scores) for every row: what a whole
// round over rows of four chunks passes over, without a branch per row.
template <class F> inline void each_of_four(const Store& s, F f) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  s.directory->for_each([&](Segment& g) {
    for (u32 group = 0; group < g.groups; ++group)
      for (u32 live = live_group(g.tags + size_t(group) * 16); live; live &= live - 1) {
        const u32 i = group * 16 + u32(__builtin_ctz(live));
        const i4 bits = *reinterpret_cast<const i4*>(g.utils + size_t(i) * 4);
        f(g, i, bits, scores_of_four(bits, 1.0f, bonus, prefix));
      }
  });
}
inline bool is_four(const Store& s, const Range& r) {
  return s.c.max_chunks == 4 && r.table < 0 && !r.low && !~r.high && equal_weights(s);
}

// The same over everything in range. Chunks of a row often share a bin: they count in four arrays, so
// that an increment need not wait for the one before.
inline std::vector<i64> whole_histogram(const Store& s, const Range& range) {
  std::vector<u32> part(size_t(4) * kBins, 0);
  if (is_four(s, range)) {
    i4 uncounted = {};
    each_of_four(s, [&](Segment&, u32, i4 bits, v4 score) {
      const i4 pattern = reinterpret_cast<i4>(score), at = pattern >> 16;
      for (int j = 0; j < 4; ++j) ++part[size_t(j) * kBins + u32(at[j])];
      uncounted += (pattern == 0) & (bits >= 0);   // minus one per lane
    });
    for (int j = 0; j < 4; ++j) part[size_t(j) * kBins] += u32(uncounted[j]);
  } else each_scored(s, range, [&](Segment&, size_t, const float* u, const float* score) {
    for (int j = 0; j < s.c.max_chunks; ++j)
      part[size_t(j & 3) * kBins + (bits_of(score[j]) >> 16)] += counted(u, score, j);
  });
  std::vector<i64> bins(kBins);
  for (size_t b = 0; b < kBins; ++b) bins[b] = i64(part[b]) + part[b + kBins] + part[b + 2 * kBins] + part[b + 3 * size_t(kBins)];
  for (const Candidate& q : s.queue)
    if (range.table < 0 || q.table == range.table) ++bins[bits_of(q.score) >> 16];
  return bins;
}

// Rows that a round can still change once the bin of its threshold is known: few, so that the exact
// threshold, the survey and the plan need not pass over all rows again. `edge` are those with a chunk
// in that bin, fewer still.
struct Place { Segment* segment; u32 index; };
using Places = std::vector<Place>;
struct Listed { Places all, edge; };

inline void list_places(const Store& s, const Range& range, u32 bin, Listed& out) {
  out.edge.clear();
  size_t n = 0;
  if (is_four(s, range)) {
    each_of_four(s, [&](Segment& g, u32 i, i4 bits, v4 score) {
      const i4 at = reinterpret_cast<i4>(score) >> 16, on = at == i32(bin);
      if (n == out.all.size()) out.all.resize(n + n / 2 + 4096);
      out.all[n] = {&g, i};   // written always, kept where the row counts: no branch to guess
      n += any_bit(on | ((at > i32(bin)) ^ (bits < 0)));
      if (any_bit(on)) out.edge.push_back({&g, i});
    });
    out.all.resize(n);
    return;
  }
  out.all.clear();
  each_scored(s, range, [&](Segment& g, size_t i, const float* u, const float* score) {
    bool moves = false, on = false;
    for (int j = 0; j < s.c.max_chunks; ++j) {
      const u32 at = bits_of(score[j]) >> 16;
      if (!counted(u, score, j)) continue;
      on |= at == bin;
      moves |= (at > bin) != bool(std::signbit(u[j]));
    }
    if (moves || on) out.all.push_back({&g, u32(i)});
    if (on) out.edge.push_back({&g, u32(i)});
  });
}

// each_scored over listed rows of a table, or of all (table < 0).
template <class F> inline void each_listed(const Store& s, const Places& places, int table, F f) {
  float score[kMaxChunks + 1];
  const bool plain = equal_weights(s) && table < 0;   // then the entry is not needed
  for (size_t p = 0; p < places.size(); ++p) {
    if (p + 12 < places.size()) {
      const Place& ahead = places[p + 12];
      __builtin_prefetch(ahead.segment->entries + ahead.index);
      __builtin_prefetch(ahead.segment->utils + size_t(ahead.index) * s.c.max_chunks);
    }
    const Place& at = places[p];
    float weight = 1.0f;
    if (!plain) {
      const Entry& e = at.segment->entries[at.index];
      if (table >= 0 && e.table != table) continue;
      weight = s.tables[e.table].weight;
    }
    const float* u = at.segment->utils + size_t(at.index) * s.c.max_chunks;
    if (row_scores(s, u, weight, score)) f(*at.segment, at.index, u, score);
  }
}

// All (score, tie) pairs whose score falls into one histogram bin.
template <class Rows> inline void collect_from(const Store& s, Rows rows, int table, u32 bin, u64 salt,
                                               std::vector<std::pair<float, u64>>& out) {
  rows([&](Segment& g, size_t i, const float* u, const float* score) {
    for (int j = 0; j < s.c.max_chunks; ++j)
      if (counted(u, score, j) && bits_of(score[j]) >> 16 == bin)
        out.emplace_back(score[j], tie_of(g.entries[i].key, g.entries[i].table, salt, j));
  });
  for (const Candidate& q : s.queue)
    if ((table < 0 || q.table == table) && bits_of(q.score) >> 16 == bin)
      out.emplace_back(q.score, tie_of(q.key, q.table, salt, 0));
}
inline void collect(const Store& s, const Range& range, u32 bin, u64 salt, std::vector<std::pair<float, u64>>& out) {
  collect_from(s, [&](auto f) { each_scored(s, range, f); }, range.table, bin, salt, out);
}

// Call f(segment, index, scores, j, grows) for every chunk of `rows` that the cut wants to change.
template <class Rows, class F> inline void each_change(const Store& s, Rows rows, const Cut& cut, u64 salt, F f) {
  rows([&](Segment& g, size_t i, const float* u, const float* score) {
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

// Where an item's row is known, no search; a row that has gone in the meantime is none.
inline Found row_of(const Store& s, const Item& item) {
  if (!item.segment) return s.directory->find(item.key, item.table);
  return item.segment->tags[item.index] & 0x80 ? Found{} : s.directory->at(*item.segment, item.index);
}
inline Item item_of(Segment& g, size_t i, float score, u64 tie, int j) {
  const Entry& e = g.entries[i];
  return {score, u32(i), tie, e.key, e.table, u16(j), false, &g};
}

// Bounds on what plan() lists: growers from a histogram bin upwards, victims up to one.
struct Bounds { u32 grow_from = 0, evict_to = kBins; };

// Lists the chunks that the cut wants to change, within bounds: fills s.growers and s.victims.
template <class Rows> inline void plan_from(Store& s, Rows rows, int table, const Cut& cut, u64 salt, const Bounds& bounds) {
  each_change(s, rows, cut, salt, [&](Segment& g, size_t i, const float* score, int j, bool grows) {
    const u32 bin = bits_of(score[j]) >> 16;
    if (grows ? bin < bounds.grow_from : bin > bounds.evict_to) return;
    const Entry& e = g.entries[i];
    (grows ? s.growers : s.victims).push_back(item_of(g, i, score[j], tie_of(e.key, e.table, salt, j), j));
  });
  for (const Candidate& q : s.queue) {
    const u64 tie = tie_of(q.key, q.table, salt, 0);
    if ((table < 0 || q.table == table) && cut.below(q.score, tie) && bits_of(q.score) >> 16 >= bounds.grow_from)
      s.growers.push_back({q.score, 0, tie, q.key, q.table, 0, true, nullptr});
  }
}
inline void plan(Store& s, const Range& range, const Cut& cut, u64 salt) {
  plan_from(s, [&](auto f) { each_scored(s, range, f); }, range.table, cut, salt, {});
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

// Rows of the directory first (they come out of a segment nearly in order), then rows of the queue:
// an admission may move the entries that items point to.
inline void by_row(std::vector<Item>& items) {
  auto before = [](const Item& a, const Item& b) {
    return a.key != b.key ? a.key < b.key : a.table != b.table ? a.table < b.table : a.chunk < b.chunk;
  };
  const auto queued = std::find_if(items.begin(), items.end(), [](const Item& i) { return i.admit; });
  Item* const begin = items.data();
  Item* const middle = begin + (queued - items.begin());
  sort_nearly(begin, middle, before);
  sort_nearly(middle, begin + items.size(), before);
}

// The rows that come next: first the tags, then the entry, then its utilities and weights.
FIITED_INLINE void prefetch_run(const Store& s, const std::vector<Item>& items, size_t i) {
  if (items[i].segment) {   // known rows: entry and utilities, then weights
    if (i + 32 < items.size() && items[i + 32].segment) {
      const Item& ahead = items[i + 32];
      __builtin_prefetch(ahead.segment->entries + ahead.index, 1);
      __builtin_prefetch(ahead.segment->utils + size_t(ahead.index) * s.c.max_chunks, 1);
    }
    if (i + 16 < items.size() && items[i + 16].segment && s.c.layout == kSlabs) {
      const Entry& e = items[i + 16].segment->entries[items[i + 16].index];
      if (e.alive & kAliveMask) __builtin_prefetch(s.pool->at(e.slot, popcount(e.alive & kAliveMask)));
      s.sketch->prefetch(e.key);   // a row that loses its last chunk goes there
    }
    return;
  }
  if (i + 48 < items.size()) __builtin_prefetch(s.directory->tag_line(items[i + 48].key));
  if (i + 32 < items.size())
    if (const Entry* e = s.directory->likely(items[i + 32].key)) __builtin_prefetch(e, 1);
  if (i + 16 >= items.size() || items[i + 16].admit) return;
  const Found f = s.directory->find(items[i + 16].key, items[i + 16].table);
  if (!f.entry) return;
  __builtin_prefetch(f.util, 1);
  if (s.c.layout == kSlabs) __builtin_prefetch(s.pool->at(f.entry->slot, popcount(f.entry->alive & kAliveMask)));
}

// Runs of items of the same row, as one bitmap each.
template <class F> inline void each_run(const Store& s, const std::vector<Item>& items, F f) {
  for (size_t i = 0; i < items.size();) {
    size_t end = i;
    u16 bits = 0;
    prefetch_run(s, items, i);
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
  each_run(s, s.victims, [&](const Item& item, u16 bits) {
    Found f = row_of(s, item);
    if (!f.entry) return;
    const u16 want = closed(s, u16(f.entry->alive & kAliveMask & ~bits));
    s.set_alive(f, want, false);
    if (!want) s.remove(f);
  });
  const i64 room = std::max<i64>(0, s.free_slots());
  if (i64(s.growers.size()) > room) { s.n.refused += i64(s.growers.size()) - room; keep_best(s.growers, size_t(room)); }
  by_row(s.growers);
  each_run(s, s.growers, [&](const Item& item, u16 bits) {
    Found f = row_of(s, item);
    if (f.entry) s.set_alive(f, closed(s, u16((f.entry->alive | bits) & kAliveMask)), false);
    else if (item.admit) s.admit(item.key, item.table, 1, item.score / s.tables[item.table].weight);
  });
  s.growers.clear();
  s.victims.clear();
}

}  // namespace fiited
