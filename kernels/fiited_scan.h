// A whole round: a sample tells about where the threshold lies, one pass over all utilities lists the rows
// that the round can change, then the exact threshold and the moves come from that list alone.
#pragma once

#include <numeric>

#include "fiited_exchange.h"

namespace fiited {

// Rows that a round can still change. Scores carry the sign of the utility: set where the chunk is alive.
struct Place { Segment* segment; u32 index; };
struct Listed {
  int k = 0;
  Pile<Place> rows;
  Pile<float> scores;   // k per row
  void cut_to(size_t n) { rows.cut_to(n); scores.cut_to(n * size_t(k)); }
};

// Bins in which the threshold lies. A row is listed if it has a dead chunk from `low` upwards or a living
// one up to `high`: what is outside stays as it is, wherever in the window the threshold turns out to be.
struct Window { i32 low, high; };

inline bool is_four(const Store& s, const Range& r) {
  return s.c.max_chunks == 4 && r.table < 0 && !r.low && !~r.high && equal_weights(s);
}

// Call f(segment, first cell, bits of its cells that hold a row) for every `stride`th group of 16 cells.
template <class F> inline void each_group(const Store& s, u32 stride, F f) {
  u32 group = 0;
  s.directory->for_each([&](Segment& g) {
    for (; group < g.groups; group += stride) {
      const float* const next = g.utils + size_t(group + 8 * stride) * 16 * s.c.max_chunks;
      for (int line = 0; line < s.c.max_chunks; ++line) __builtin_prefetch(next + line * 16);
      f(g, group * 16, live_group(g.tags + size_t(group) * 16));
    }
    group -= g.groups;   // the stride goes on over the ends of segments
  });
}

// Adds the scores of every `stride`th group to the bins, each `stride` times. Chunks of a row often share a
// bin: they count in four arrays, so that an increment need not wait for the one before.
inline void count_four(const Store& s, u32 stride, std::vector<i64>& bins) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  std::vector<u32> part(size_t(4) * kBins, 0);
  u32* const count = part.data();
  i4 uncounted = {};
  each_group(s, stride, [&](Segment& g, u32 cell, u32 live) {
    for (; live; live &= live - 1) {
      const i4 bits = *reinterpret_cast<const i4*>(g.utils + size_t(cell + u32(__builtin_ctz(live))) * 4);
      const i4 pattern = reinterpret_cast<i4>(scores_of_four(bits, 1.0f, bonus, prefix)), at = pattern >> 16;
      for (u32 j = 0; j < 4; ++j) ++count[j * u32(kBins) + u32(at[j])];
      uncounted += (pattern == 0) & (bits >= 0);   // minus one per lane
    }
  });
  for (size_t b = 0; b < kBins; ++b)
    bins[b] += i64(stride) * (i64(part[b]) + part[b + kBins] + part[b + 2 * kBins] + part[b + 3 * size_t(kBins)]);
  for (int j = 0; j < 4; ++j) bins[0] += i64(stride) * uncounted[j];
}
inline void count_any(const Store& s, const Range& range, std::vector<i64>& bins) {
  each_scored(s, range, [&](Segment&, size_t, const float* u, const float* score) {
    for (int j = 0; j < s.c.max_chunks; ++j)
      if (counted(u, score, j)) ++bins[bits_of(score[j]) >> 16];
  });
}

// Where `target` chunks lie above, give or take `margin`.
inline Window window_of(const std::vector<i64>& bins, i64 target, i64 margin) {
  Window w{0, 0};
  i64 above = 0;
  for (i32 b = kBins - 1; b >= 0; --b) {
    above += bins[b];
    if (!w.high && above > target - margin) w.high = b;
    if (above > target + margin) { w.low = b; break; }
  }
  return w;
}

// Lists the rows that the window keeps; returns the number of chunks above it.
inline i64 list_four(const Store& s, Window w, Listed& out) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  const i4 under = i4{} + (w.low - 1), high = i4{} + w.high, over = high + 1;
  i4 above = {};
  each_group(s, 1, [&](Segment& g, u32 cell, u32 live) {
    Place* const row = out.rows.next(16);
    i4* const score = reinterpret_cast<i4*>(out.scores.next(64));
    u32 n = 0;
    for (; live; live &= live - 1) {
      const u32 i = cell + u32(__builtin_ctz(live));
      const i4 bits = *reinterpret_cast<const i4*>(g.utils + size_t(i) * 4);
      const i4 pattern = reinterpret_cast<i4>(scores_of_four(bits, 1.0f, bonus, prefix)), at = pattern >> 16;
      above -= at > high;   // a lane that is true is minus one
      row[n] = {&g, i};     // written always, kept where the row counts: no branch to guess
      score[n] = pattern | (bits & INT32_MIN);
      n += lanes(bits < 0 ? at < over : at > under) != 0;
    }
    out.rows.grow(n);
    out.scores.grow(4 * n);
  });
  return i64(above[0]) + above[1] + above[2] + above[3];
}
inline i64 list_any(const Store& s, const Range& range, Window w, Listed& out) {
  i64 above = 0;
  each_scored(s, range, [&](Segment& g, size_t i, const float* u, const float* score) {
    bool kept = false;
    float* const to = out.scores.next(out.k);
    if (out.k == 4) {
      const i4 bits = *reinterpret_cast<const i4*>(u), pattern = *reinterpret_cast<const i4*>(score), at = pattern >> 16;
      *reinterpret_cast<i4*>(to) = pattern | (bits & INT32_MIN);
      for (int j = 0; j < 4; ++j) above += at[j] > w.high;
      kept = lanes(bits < 0 ? at <= w.high : (at >= w.low) & (pattern != 0)) != 0;
    } else for (int j = 0; j < out.k; ++j) {
      to[j] = std::copysign(score[j], u[j]);
      if (!counted(u, score, j)) continue;
      const i32 at = i32(bits_of(score[j]) >> 16);
      above += at > w.high;
      kept |= std::signbit(u[j]) ? at <= w.high : at >= w.low;
    }
    *out.rows.next() = {&g, u32(i)};
    out.rows.grow(kept);
    out.scores.grow(size_t(out.k) * kept);
  });
  return above;
}

// The listed rows with a chunk inside the window; adds their chunks inside it to the bins. Chunks outside
// count too, each column in a bin behind the last: no branch to guess, and none waits for another.
inline Pile<u32> near_rows(const Listed& listed, size_t first, Window w, std::vector<i64>& bins) {
  Pile<u32> near;
  std::vector<u32> count(kBins + kMaxChunks + 1, 0);
  for (size_t p = first; p < listed.rows.size(); ++p) {
    const float* const score = &listed.scores[p * listed.k];
    bool any = false;
    if (listed.k == 4) {
      const i4 bits = *reinterpret_cast<const i4*>(score), at = (bits & INT32_MAX) >> 16;
      const i4 inside = (at >= w.low) & (at <= w.high) & (bits != 0);
      const i4 bin = inside ? at : i4{kBins, kBins + 1, kBins + 2, kBins + 3};
      for (int j = 0; j < 4; ++j) ++count[u32(bin[j])];
      any = lanes(inside) != 0;
    } else for (int j = 0; j < listed.k; ++j) {
      const i32 bits = i32(bits_of(score[j])), at = (bits & INT32_MAX) >> 16;
      const bool inside = at >= w.low && at <= w.high && bits;
      ++count[inside ? at : kBins + j];
      any |= inside;
    }
    *near.next() = u32(p);
    near.grow(any);
  }
  for (i32 b = w.low; b <= w.high; ++b) bins[b] += count[b];
  return near;
}

// The threshold of a round over a range; lists the rows that it can still change. A sample tells where it
// lies, about four standard deviations to either side; where it does not, all scores are counted first.
inline Cut exact_cut(const Store& s, const Range& range, i64 target, u64 salt, Listed& listed) {
  const size_t first = listed.rows.size();
  const bool four = is_four(s, range);
  constexpr u32 stride = 16;
  std::vector<i64> queued(kBins, 0), bins;
  for (const Candidate& q : s.queue)
    if (range.table < 0 || q.table == range.table) ++queued[bits_of(q.score) >> 16];
  Pile<u32> near;
  i64 above = 0;
  i32 b = -1;
  for (bool sampled = four;; sampled = false) {
    bins = queued;
    if (four) count_four(s, sampled ? stride : 1, bins);
    else count_any(s, range, bins);
    const Window w = window_of(bins, target, sampled ? i64(stride * std::sqrt(double(target))) : 0);
    listed.cut_to(first);
    above = four ? list_four(s, w, listed) : list_any(s, range, w, listed);
    bins = queued;
    near = near_rows(listed, first, w, bins);
    above = std::accumulate(bins.begin() + w.high + 1, bins.end(), above);
    const bool low_enough = above <= target;
    for (b = w.high; b >= w.low && above + bins[b] <= target; --b) above += bins[b];
    if (low_enough && (b >= w.low || !w.low)) break;
  }
  if (b < 0) return {};
  std::vector<float> scores;   // of the chunks in the bin of the threshold
  auto each_member = [&](auto f) {
    for (const u32 p : near)
      for (int j = 0; j < listed.k; ++j) {
        const float signed_score = listed.scores[size_t(p) * listed.k + j], score = std::fabs(signed_score);
        if (bits_of(signed_score) && bits_of(score) >> 16 == u32(b)) f(score, p, j);
      }
  };
  auto each_queued = [&](auto f) {
    for (const Candidate& q : s.queue)
      if ((range.table < 0 || q.table == range.table) && bits_of(q.score) >> 16 == u32(b)) f(q);
  };
  each_member([&](float score, u32, int) { scores.push_back(score); });
  each_queued([&](const Candidate& q) { scores.push_back(q.score); });
  const auto nth = scores.begin() + (target - above);
  std::nth_element(scores.begin(), nth, scores.end(), std::greater<>());
  const float edge = *nth;
  const i64 better = std::count_if(scores.begin(), nth, [&](float score) { return score > edge; });
  std::vector<u64> ties;   // of equals only
  each_member([&](float score, u32 p, int j) {
    if (score != edge) return;
    const Entry& e = listed.rows[p].segment->entries[listed.rows[p].index];
    ties.push_back(tie_of(e.key, e.table, salt, j));
  });
  each_queued([&](const Candidate& q) { if (q.score == edge) ties.push_back(tie_of(q.key, q.table, salt, 0)); });
  const auto last = ties.begin() + (target - above - better);
  std::nth_element(ties.begin(), last, ties.end(), std::greater<>());
  return {edge, *last};
}

struct Moves {
  Pile<Move> rows;
  i64 chunks = 0;
  void add(const Move& m) {   // written always, kept where it changes something
    *rows.next() = m;
    rows.grow(m.bits != 0);
    chunks += popcount(m.bits & kAliveMask);
  }
};

// What a round works with. Large ones are kept for the next round: to map them anew costs more than to fill
// them. They count as scratch.
struct Desk {
  Listed listed;
  Moves growers, victims;
  i64 bytes() const { return listed.rows.bytes() + listed.scores.bytes() + growers.rows.bytes() + victims.rows.bytes(); }
  void clear(int k) {
    listed.k = k;
    listed.cut_to(0);
    for (Moves* m : {&growers, &victims}) { m->rows.cut_to(0); m->chunks = 0; }
  }
  void leave() {
    if (bytes() < i64(4) << 20 || listed.rows.bytes() > i64(8 * sizeof(Place) * listed.rows.size())) *this = {};
  }
};

// What the cut wants to change among the listed rows from `first` on.
inline void survey(const Store& s, const Listed& listed, size_t first, const Cut& cut, u64 salt, Moves& growers,
                   Moves& victims) {
  const size_t n = listed.rows.size();
  const i32 edge = i32(bits_of(cut.score));   // as an integer: scores are not negative, an open cut is
  for (size_t p = first; p < n; ++p) {
    if (p + 16 < n) __builtin_prefetch(listed.rows[p + 16].segment->entries + listed.rows[p + 16].index);
    const Place& at = listed.rows[p];
    const float* const score = &listed.scores[p * listed.k];
    u32 alive = 0, want = 0, even = 0;
    if (listed.k == 4) {
      const i4 bits = *reinterpret_cast<const i4*>(score), size = bits & INT32_MAX;
      alive = lanes(bits);
      want = lanes((size > edge) & (bits != 0));
      even = lanes((size == edge) & (bits != 0));
    } else for (int j = 0; j < listed.k; ++j) {
      const i32 bits = i32(bits_of(score[j])), size = bits & INT32_MAX;
      alive |= u32(bits < 0) << j;
      want |= u32(size > edge && bits) << j;
      even |= u32(size == edge && bits) << j;
    }
    const Entry& e = at.segment->entries[at.index];
    for (; even; even &= even - 1) {
      const int j = __builtin_ctz(even);
      if (tie_of(e.key, e.table, salt, j) > cut.tie) want |= 1u << j;
    }
    const bool safe = (e.alive & kPinned) || int(u16(s.round - e.grown)) <= s.c.min_alive;
    growers.add({e.key, at.segment, at.index, u32(p), 0.0f, e.table, u16(want & ~alive)});
    victims.add({e.key, at.segment, at.index, u32(p), 0.0f, e.table, u16(safe ? 0 : alive & ~want)});
  }
}

// Keep the n best (or the n worst) chunks of the moves: whole bins, and of one bin the exact ones.
template <bool kBest> inline void keep(const Listed& listed, Moves& moves, i64 n, u64 salt) {
  if (moves.chunks <= n) return;
  const int k = listed.k;
  auto score_of = [&](const Move& m, int j) {
    return m.bits & kAdmit ? m.score : std::fabs(listed.scores[size_t(m.from) * k + j]);
  };
  std::vector<u32> bins(kBins + 1, 0);   // the last one takes what a move does not change
  for (const Move& m : moves.rows) {
    if (m.bits & kAdmit) { ++bins[bits_of(m.score) >> 16]; continue; }
    const float* const score = &listed.scores[size_t(m.from) * k];
    for (int j = 0; j < k; ++j) ++bins[m.bits >> j & 1 ? bits_of(std::fabs(score[j])) >> 16 : u32(kBins)];
  }
  i32 edge = kBest ? kBins - 1 : 0;
  i64 need = n;
  for (; need > i64(bins[edge]); edge += kBest ? -1 : 1) need -= bins[edge];
  struct Rank { float score; u64 tie; Move* move; int chunk; };
  std::vector<Rank> ranks;
  for (Move& m : moves.rows) {
    u32 inside = 0, even = 0;
    if (k == 4 && !(m.bits & kAdmit)) {
      const i4 at = (reinterpret_cast<const i4&>(listed.scores[size_t(m.from) * 4]) & INT32_MAX) >> 16;
      inside = lanes(kBest ? at > edge : at < edge);
      even = lanes(at == edge);
    } else for (int j = 0; j < k; ++j) {
      const i32 at = i32(bits_of(score_of(m, j)) >> 16);
      inside |= u32(kBest ? at > edge : at < edge) << j;
      even |= u32(at == edge) << j;
    }
    for (even &= m.bits; even; even &= even - 1) {
      const int j = __builtin_ctz(even);
      ranks.push_back({score_of(m, j), tie_of(m.key, m.table, salt, j), &m, j});
    }
    m.bits &= u16(inside | kAdmit);
  }
  std::sort(ranks.begin(), ranks.end(), [](const Rank& a, const Rank& b) {
    return kBest == (a.score != b.score ? a.score > b.score : a.tie > b.tie);
  });
  for (i64 i = 0; i < need; ++i) ranks[i].move->bits |= u16(1u << ranks[i].chunk);
  moves.rows.drop_if([](const Move& m) { return !(m.bits & kAliveMask); });
  moves.chunks = n;
}

}  // namespace fiited
