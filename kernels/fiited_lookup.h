// Lookup: distinct rows of a batch, their entries, and the gather into bags.
#pragma once

#include "fiited_plain.h"

namespace fiited {

struct Batch {   // one lookup and, later, its update
  Pile<Row> rows;
  std::vector<u32> inverse;          // row of each value
  std::vector<u32> bag;              // per value; empty: its position in its table, and no value has a weight
  std::vector<u32> order;            // values by row, in order of appearance; their bags where no value has a weight
  std::vector<float> scale;          // per value; empty means 1
  std::vector<u32> table_start;      // first value of each table
  std::vector<i64> column;
  u64 version = 0;
  bool train = false, used = false;
  u32 bag_of(u32 value, u32 begin) const { return bag.empty() ? value - begin : bag[value]; }
};

// Open-addressing table for the distinct rows of one table of a batch. A cell holds `base` plus the number of a
// row; what earlier tables left is below `base` of the next. Small on purpose: it lives in the first cache.
struct Scratch {
  std::vector<u32> cells, counts;
  std::vector<u64> keys;
  u32 base = 1;
  size_t mask = 0;
  void reserve(size_t n) {
    size_t size = 64;
    while (size < 2 * n) size *= 2;
    if (size > cells.size() || base > ~u32(0) - u32(n)) { cells.assign(std::max(size, cells.size()), 0); base = 1; }
    if (n >= keys.size()) { keys.resize(n + 1); counts.resize(n + 1); }
    mask = size - 1;
  }
  i64 bytes() const { return i64(4 * (cells.size() + counts.size()) + 8 * keys.size()); }
};

// Finds the entries of rows that arrive one after the other, in three steps, so that the memory of one loads
// while others take theirs. Weights are asked for by those who read them: earlier was slower.
class Resolver {
 public:
  static constexpr size_t kBlock = 32;
  Resolver(Store& s, Row* rows) : s_(s), rows_(rows) {}
  void advance(size_t n) {   // at most kBlock rows more than at the call before
    if (s_.c.layout == kDense) {
      for (; settled_ < homed_; ++settled_) s_.resolve(rows_[settled_]);
      for (; homed_ < n; ++homed_) __builtin_prefetch(&s_.dense_entries[rows_[homed_].v]);
      return;
    }
    const Directory& directory = *s_.directory;
    for (; settled_ < looked_; ++settled_) {
      Row& r = rows_[settled_];
      s_.take(r, directory.settle(homes_[settled_ % kRing], r.v, r.table));
    }
    for (; looked_ < homed_; ++looked_) directory.look(homes_[looked_ % kRing], rows_[looked_].v);
    for (; homed_ < n; ++homed_) {
      Home& home = homes_[homed_ % kRing];
      home = directory.home_of(rows_[homed_].v);
      __builtin_prefetch(home.tags);
    }
  }
  void finish(size_t n) { while (settled_ < n) advance(n); }

 private:
  static constexpr size_t kRing = 4 * kBlock;
  Store& s_;
  Row* const rows_;
  size_t homed_ = 0, looked_ = 0, settled_ = 0;
  Home homes_[kRing];
};
inline void resolve_all(Store& s, Pile<Row>& rows) {
  Resolver resolver(s, rows.begin());
  for (size_t i = 16; i < rows.size(); i += 16) resolver.advance(i);
  resolver.finish(rows.size());
}

// Tells the distinct rows of a table apart and finds their entries.
inline void find_distinct(Store& s, Batch& b, Scratch& scratch, const i64* ids, int t) {
  const u32 begin = b.table_start[t], end = b.table_start[t + 1], first = u32(b.rows.size());
  const TableConfig& table = s.tables[t];
  const bool dense = s.c.layout == kDense;
  scratch.reserve(end - begin);
  u32 *const cells = scratch.cells.data(), *const counts = scratch.counts.data();
  u64* const known = scratch.keys.data();
  const size_t mask = scratch.mask;
  const u32 base = scratch.base;
  constexpr u32 kBlock = Resolver::kBlock;   // cells of a block are on their way while those of the one before are read
  Row* const rows = b.rows.next(end - begin);
  Resolver resolver(s, rows);
  u64 keys[2 * kBlock];
  u32 n = 0;
  auto home = [&](u64 v) { return (dense ? v * kMixer >> 40 : v >> 20) & mask; };
  for (u32 low = begin; low < end + kBlock; low += kBlock) {
    for (u32 i = low; i < std::min(low + kBlock, end); ++i) {
      const u64 v = dense ? u64(ids[i] + s.dense_offset[t]) : virtual_row(table, u64(ids[i]));
      keys[(i - begin) % (2 * kBlock)] = v;
      __builtin_prefetch(cells + home(v), 1);
    }
    if (low == begin) continue;
    u32 missing[kBlock], m = 0;
    for (u32 i = low - kBlock; i < std::min(low, end); ++i) {   // no branch to guess: half of the ids are new
      const u64 v = keys[(i - begin) % (2 * kBlock)];
      const u32 row = std::min(cells[home(v)] - base, n);
      const bool seen = (row < n) & (known[row] == v);
      b.inverse[i] = first + row;
      counts[row] += seen;
      missing[m] = i;
      m += !seen;
    }
    for (u32 q = 0; q < m; ++q) {
      const u32 i = missing[q];
      const u64 v = keys[(i - begin) % (2 * kBlock)];
      size_t at = home(v);
      while (cells[at] - base < n && known[cells[at] - base] != v) at = (at + 1) & mask;
      const u32 row = std::min(cells[at] - base, n);
      if (row == n) {
        cells[at] = base + n;
        known[n] = v;
        counts[n] = 0;
        rows[n].v = v;   // the rest comes with the entry
        rows[n++].table = u16(t);
      }
      b.inverse[i] = first + row;
      ++counts[row];
    }
    resolver.advance(n);
  }
  resolver.finish(n);
  scratch.base += n;
  b.rows.grow(n);
}

// For an update: how often each row of a table came, its values in order, and what the statistics need.
inline void arrange(Store& s, Batch& b, Scratch& scratch, int t, u32 first) {
  const u32 begin = b.table_start[t], end = b.table_start[t + 1];
  u32* const next = scratch.counts.data();
  u32 at = begin;
  i64 hits = 0;
  for (u32 row = first; row < b.rows.size(); ++row) {
    Row& r = b.rows[row];
    r.count = next[row - first];
    r.start = next[row - first] = at;
    at += r.count;
    if (r.e) hits += r.count;
    else if (s.c.layout != kDense) s.saw_row(r.v, r.table);
  }
  s.n.lookups += end - begin;
  s.n.hits += hits;
  const bool weighted = !b.scale.empty();
  for (u32 i = begin; i < end; ++i) b.order[next[b.inverse[i] - first]++] = weighted ? i : b.bag_of(i, begin);
}

FIITED_INLINE void prefetch_floats(const float* at, int floats) {
  for (int i = 0; i < floats; i += 16) __builtin_prefetch(at + i);
}
FIITED_INLINE void prefetch_weights(const Store& s, const Row& r, int parts) {
  if (r.w) prefetch_floats(reinterpret_cast<const float*>(r.w), popcount(r.alive) * (parts > 1 ? s.chunk_bytes : s.c.chunk * s.weight_bytes) / 4);
  else if (r.refs)
    for (u32 m = r.alive; m; m &= m - 1) __builtin_prefetch(s.chunk_at(r, __builtin_ctz(m)));
}
// Part of what was tuned on a Xeon with AVX-512; on an EPYC with AVX2 a step took 15 to 27 % longer with it.
FIITED_INLINE void prefetch_write([[maybe_unused]] float* at, [[maybe_unused]] int floats) {
#ifdef __AVX512F__
  for (int i = 0; i < floats; i += 16) __builtin_prefetch(at + i, 1);
#endif
}

inline void copy_floats(float* out, const float* from, int floats) {   // floats is a multiple of 4
  int i = 0;
  for (; i + kWide <= floats; i += kWide) *reinterpret_cast<Wide*>(out + i) = *reinterpret_cast<const Wide*>(from + i);
  for (; i < floats; i += 4) *reinterpret_cast<v4*>(out + i) = *reinterpret_cast<const v4*>(from + i);
}
inline void zero_floats(float* out, int floats) {
  int i = 0;
  for (; i + kWide <= floats; i += kWide) *reinterpret_cast<Wide*>(out + i) = Wide{};
  for (; i < floats; i += 4) *reinterpret_cast<v4*>(out + i) = v4{};
}

// Visit the alive chunks of a row; in layout B they are the first len chunks.
template <class F> inline void each_chunk(const Store& s, const Row& r, F f) {
  for (u32 m = r.alive; m; m &= m - 1) {
    const int j = __builtin_ctz(m);
    f(j, s.chunk_at(r, j));
  }
}

// `mask_below` > 0 hides chunks whose stored utility is smaller (the quality guard's second score).
inline bool hidden(const Row& r, int j, float mask_below) {
  return mask_below > 0 && std::fabs(r.u[j]) < mask_below;
}

inline void write_row(const Store& s, const Row& r, float* out, int k, float mask_below) {
  const int C = s.c.chunk;
  if (!r.e) { zero_floats(out, k * C); return; }
  if (r.w && mask_below <= 0) {
    const int floats = popcount(r.alive) * C;
    if (s.c.half) widen(out, reinterpret_cast<const u16*>(r.w), floats);
    else copy_floats(out, reinterpret_cast<const float*>(r.w), floats);
    zero_floats(out + floats, k * C - floats);
    return;
  }
  for (int j = 0; j < k; ++j) {
    if ((r.alive >> j & 1) && !hidden(r, j, mask_below)) s.read_weights(out + j * C, s.chunk_at(r, j), C);
    else zero_floats(out + j * C, C);
  }
}

inline void add_row(const Store& s, const Row& r, float* out, float scale, float mask_below) {
  if (!r.e) return;
  const int C = s.c.chunk;
  each_chunk(s, r, [&](int j, const u8* w) {
    if (hidden(r, j, mask_below)) return;
    for (int i = 0; i < C; i += 4) {
      v4& target = *reinterpret_cast<v4*>(out + j * C + i);
      const v4 more = s.c.half ? widen_4(reinterpret_cast<const u16*>(w) + i) : *reinterpret_cast<const v4*>(w + 4 * i);
      target = target + more * scale;
    }
  });
}

// Whether every row of a table's part of the output begins where whole vectors do, and the output is too large to
// stay in the cache until someone reads it: then it goes past the cache, and what the update needs remains there.
inline bool streams(const float* column, i64 bags, i64 stride) {
  return bags * stride * 4 >= kStreamFrom && (reinterpret_cast<size_t>(column) | size_t(stride * 4)) % sizeof(Wide) == 0;
}

// out[bag][column[t] ...] of table t; offsets (absolute, [tables][bags + 1]) may be null.
inline void gather(const Store& s, const Batch& b, int t, const i64* offsets, i64 bags, float* out,
                   i64 stride, float mask_below) {
  const int k = s.tables[t].chunks, D = k * s.c.chunk;
  const u32 begin = b.table_start[t], end = b.table_start[t + 1];
  float* column = out + b.column[t];
  if (!offsets && b.scale.empty() && mask_below <= 0 && s.c.layout != kChunked) {
    const bool stream = streams(column, bags, stride);
    auto plainly = [&](auto gather) { gather(b.rows.begin(), b.inverse.data() + begin, end - begin, k, column, stride); return true; };
    auto of_width = [&](auto width) {
      constexpr int C = decltype(width)::value;
      if (s.c.half) return plainly(stream ? gather_plain<C, true, true> : gather_plain<C, true, false>);
      return plainly(stream ? gather_plain<C, false, true> : gather_plain<C, false, false>);
    };
    if (s.c.chunk == 4) return void(of_width(std::integral_constant<int, 4>()));
    if (s.c.chunk == 8) return void(of_width(std::integral_constant<int, 8>()));
    if (s.c.chunk == 16) return void(of_width(std::integral_constant<int, 16>()));
  }
  if (!offsets && b.scale.empty()) {
    for (u32 i = begin; i < end; ++i) {
      if (i + 10 < end) prefetch_weights(s, b.rows[b.inverse[i + 10]], 1);
      if (i + 8 < end) prefetch_write(column + i64(i + 8 - begin) * stride, D);
      write_row(s, b.rows[b.inverse[i]], column + i64(i - begin) * stride, k, mask_below);
    }
    return;
  }
  for (i64 bag = 0; bag < bags; ++bag) zero_floats(column + bag * stride, D);
  for (u32 i = begin; i < end; ++i) {
    if (i + 10 < end) prefetch_weights(s, b.rows[b.inverse[i + 10]], 1);
    add_row(s, b.rows[b.inverse[i]], column + i64(b.bag_of(i, begin)) * stride, b.scale.empty() ? 1.0f : b.scale[i], mask_below);
  }
}

}  // namespace fiited
