// A whole round: one pass over all utilities counts the scores and lists the rows that the round can
// change, then the exact threshold and the moves come from that list alone.
#pragma once

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
struct Window {
  i32 low = kBins, high = -1;   // nothing is listed
  bool has(i32 bin) const { return bin >= low && bin <= high; }
};

inline bool is_four(const Store& s, const Range& r) {
  return s.c.max_chunks == 4 && r.table < 0 && !r.low && !~r.high && equal_weights(s);
}

// A pass over the rows of every `stride`th group of four chunks: counts their scores into `bins`, each `stride`
// times, and lists those that the window keeps (null: none). Chunks of a row often share a bin: they
// count in four arrays, so that an increment need not wait for the one before.
inline void scan_four(const Store& s, u32 stride, Window w, Listed* out, std::vector<i64>& bins) {
  const bool prefix = s.c.layout != kChunked;
  const float bonus = 1.0f + s.c.hysteresis;
  const i4 under = i4{} + (w.low - 1), over = i4{} + (w.high + 1);
  std::vector<u32> part(size_t(4) * kBins, 0);
  u32* const count = part.data();
  Place spare[16];
  i4 spare_scores[16], uncounted = {};
  u32 group = 0;
  s.directory->for_each([&](Segment& g) {
    for (; group < g.groups; group += stride) {
      const float* const utils = g.utils + size_t(group) * 64;
      for (int line = 0; line < 4; ++line) __builtin_prefetch(utils + size_t(stride) * 512 + line * 16);
      Place* row = out ? out->rows.next(16) : spare;
      i4* score = out ? reinterpret_cast<i4*>(out->scores.next(64)) : spare_scores;
      u32 n = 0;
      for (u32 live = live_group(g.tags + size_t(group) * 16); live; live &= live - 1) {
        const u32 i = u32(__builtin_ctz(live));
        const i4 bits = *reinterpret_cast<const i4*>(utils + size_t(i) * 4);
        const i4 pattern = reinterpret_cast<i4>(scores_of_four(bits, 1.0f, bonus, prefix)), at = pattern >> 16;
        for (u32 j = 0; j < 4; ++j) ++count[j * u32(kBins) + u32(at[j])];
        uncounted += (pattern == 0) & (bits >= 0);   // minus one per lane
        row[n] = {&g, group * 16 + i};   // written always, kept where the row counts: no branch to guess
        score[n] = pattern | (bits & INT32_MIN);
        n += lanes(bits < 0 ? at < over : at > under) != 0;
      }
      if (!out) continue;
      out->rows.grow(n);
      out->scores.grow(4 * n);
    }
    group -= g.groups;   // the stride goes on over the ends of segments
  });
  for (size_t b = 0; b < kBins; ++b)
    bins[b] += i64(stride) * (i64(part[b]) + part[b + kBins] + part[b + 2 * kBins] + part[b + 3 * size_t(kBins)]);
  for (int j = 0; j < 4; ++j) bins[0] += i64(stride) * uncounted[j];
}

// The window by a sample of the rows, about four standard deviations to either side.
inline Window guess(const Store& s, std::vector<i64> bins, i64 target) {
  constexpr u32 stride = 16;
  scan_four(s, stride, {}, nullptr, bins);
  const i64 margin = i64(stride * std::sqrt(double(target)));
  Window w{0, 0};
  i64 above = 0;
  for (i32 b = kBins - 1; b >= 0; --b) {
    above += bins[b];
    if (!w.high && above > target - margin) w.high = b;
    if (above > target + margin) { w.low = b; break; }
  }
  return w;
}

inline void scan_any(const Store& s, const Range& range, Window w, Listed& out, std::vector<i64>& bins) {
  each_scored(s, range, [&](Segment& g, size_t i, const float* u, const float* score) {
    bool kept = false;
    float* const to = out.scores.next(out.k);
    for (int j = 0; j < out.k; ++j) {
      to[j] = std::copysign(score[j], u[j]);
      if (!counted(u, score, j)) continue;
      const i32 at = i32(bits_of(score[j]) >> 16);
      ++bins[at];
      kept |= std::signbit(u[j]) ? at <= w.high : at >= w.low;
    }
    *out.rows.next() = {&g, u32(i)};
    out.rows.grow(kept);
    out.scores.grow(size_t(out.k) * kept);
  });
}

// All (score, tie) pairs of listed rows and of the queue whose score falls into one bin.
inline std::vector<std::pair<float, u64>> members_of(const Store& s, const Listed& listed, size_t first, int table, u32 bin,
                                                     u64 salt) {
  std::vector<std::pair<float, u64>> members;
  for (size_t p = first; p < listed.rows.size(); ++p) {
    const float* const scores = &listed.scores[p * listed.k];
    if (listed.k == 4 && !lanes((*reinterpret_cast<const i4*>(scores) & INT32_MAX) >> 16 == i32(bin))) continue;
    for (int j = 0; j < listed.k; ++j) {
      const float score = scores[j];
      if ((bits_of(score) & 0x7fffffff) >> 16 != bin || !bits_of(score)) continue;
      const Entry& e = listed.rows[p].segment->entries[listed.rows[p].index];
      members.emplace_back(std::fabs(score), tie_of(e.key, e.table, salt, j));
    }
  }
  for (const Candidate& q : s.queue)
    if ((table < 0 || q.table == table) && bits_of(q.score) >> 16 == bin)
      members.emplace_back(q.score, tie_of(q.key, q.table, salt, 0));
  return members;
}

// The threshold of a round over a range; lists the rows that it can still change.
inline Cut exact_cut(const Store& s, const Range& range, i64 target, u64 salt, Listed& listed) {
  const size_t first = listed.rows.size();
  const bool four = is_four(s, range);
  std::vector<i64> bins(kBins, 0);
  for (const Candidate& q : s.queue)
    if (range.table < 0 || q.table == range.table) ++bins[bits_of(q.score) >> 16];
  auto scan = [&](Window w, std::vector<i64>& to) {
    listed.cut_to(first);
    if (four) scan_four(s, 1, w, &listed, to);
    else scan_any(s, range, w, listed, to);
  };
  const Window w = four ? guess(s, bins, target) : Window{};
  scan(w, bins);
  i64 above = 0;
  i32 b = kBins - 1;
  for (; b >= 0 && above + bins[b] <= target; --b) above += bins[b];
  const i32 edge = std::max(b, 0);
  if (!w.has(edge)) {
    std::vector<i64> again(kBins, 0);
    scan({edge, edge}, again);
  }
  if (b < 0) return {};
  auto members = members_of(s, listed, first, range.table, u32(b), salt);
  const auto nth = members.begin() + (target - above);
  std::nth_element(members.begin(), nth, members.end(), std::greater<>());
  return {nth->first, nth->second};
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
  void leave() { if (bytes() < i64(4) << 20) *this = {}; }
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
