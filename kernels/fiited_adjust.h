// Scores of the rows of a range, and the pieces of a round over several shards: histogram of scores, members
// of one bin, lists of what to grow and evict.
#pragma once

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
    return lanes(bits | -bits) != 0;
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
    for (size_t group = begin; group < end; group += 16) {
      if (check) for (size_t line = 0; line < 8; ++line) __builtin_prefetch(g.entries + group + 32 + line * 2);
      for (u32 live = live_group(g.tags + group); live; live &= live - 1) {
        const size_t i = group + size_t(__builtin_ctz(live));
        const float* u = g.utils + i * s.c.max_chunks;
        float weight = 1.0f;
        if (check) {
          const Entry& e = g.entries[i];
          if (e.key < range.low || e.key > range.high) continue;
          if (range.table >= 0 && e.table != range.table) continue;
          weight = s.tables[e.table].weight;
        }
        if (row_scores(s, u, weight, score)) f(g, i, u, score);
      }
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

// Lists the chunks that the cut wants to change: fills s.growers and s.victims. Rows may move before the lists
// are used.
inline void plan(Store& s, const Cut& cut, u64 salt) {
  each_scored(s, {}, [&](Segment& g, size_t i, const float* u, const float* score) {
    const Entry& e = g.entries[i];
    u32 alive = 0, want = 0;
    for (int j = 0; j < s.c.max_chunks; ++j) {
      const bool is_alive = std::signbit(u[j]);
      alive |= u32(is_alive) << j;
      if (score[j] < cut.score || (score[j] <= 0 && !is_alive)) continue;
      if (score[j] > cut.score || tie_of(e.key, e.table, salt, j) > cut.tie) want |= 1u << j;
    }
    const bool safe = (e.alive & kPinned) || int(u16(s.round - e.grown)) <= s.c.min_alive;
    for (u32 m = want ^ alive; m; m &= m - 1) {
      const int j = __builtin_ctz(m);
      const bool grows = want >> j & 1;
      if (grows || !safe)
        (grows ? s.growers : s.victims).push_back({score[j], tie_of(e.key, e.table, salt, j), e.key, e.table, u16(j), false});
    }
  });
  for (const Candidate& q : s.queue) {
    const u64 tie = tie_of(q.key, q.table, salt, 0);
    if (cut.below(q.score, tie)) s.growers.push_back({q.score, tie, q.key, q.table, 0, true});
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

}  // namespace fiited
