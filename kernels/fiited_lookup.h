// Lookup: distinct rows of a batch, their entries, and the gather into bags.
#pragma once

#include "fiited_plain.h"

namespace fiited {

struct Batch {   // one lookup and, later, its update
  std::vector<Row> rows;
  std::vector<u32> inverse, bag, order;
  std::vector<float> scale;          // per value; empty means 1
  std::vector<u32> table_start;      // first value of each table
  std::vector<i64> column;
  u64 version = 0;
  bool train = false, used = false;
};

struct Scratch {   // open-addressing table for the distinct rows of one table of a batch
  struct Cell { u64 key; u32 stamp, index; };
  std::vector<Cell> cells;
  u32 stamp = 0;
  size_t mask = 0;
  void reserve(size_t n) {
    size_t size = 64;
    while (size < 2 * n) size *= 2;
    if (size > cells.size()) { cells.assign(size, Cell{}); stamp = 0; }
    if (++stamp == 0) { std::fill(cells.begin(), cells.end(), Cell{}); stamp = 1; }
    mask = size - 1;
  }
  i64 bytes() const { return i64(cells.size() * sizeof(Cell)); }
};

inline void find_distinct(const Store& s, Batch& b, Scratch& scratch, const i64* ids, int t) {
  const u32 begin = b.table_start[t], end = b.table_start[t + 1];
  const TableConfig& table = s.tables[t];
  const bool dense = s.c.layout == kDense;
  scratch.reserve(end - begin);
  Scratch::Cell* const cells = scratch.cells.data();
  const size_t mask = scratch.mask;
  const u32 stamp = scratch.stamp;
  constexpr u32 kBlock = 32;   // cells of a block are on their way while those of the one before are read
  u64 keys[2 * kBlock];
  auto home = [&](u64 v) { return (dense ? v * kMixer >> 40 : v >> 20) & mask; };
  for (u32 low = begin; low < end + kBlock; low += kBlock) {
    for (u32 i = low; i < std::min(low + kBlock, end); ++i) {
      const u64 v = dense ? u64(ids[i] + s.dense_offset[t]) : virtual_row(table, u64(ids[i]));
      keys[(i - begin) % (2 * kBlock)] = v;
      __builtin_prefetch(cells + home(v), 1);
    }
    if (low == begin) continue;
    for (u32 i = low - kBlock; i < std::min(low, end); ++i) {
      const u64 v = keys[(i - begin) % (2 * kBlock)];
      size_t at = home(v);
      while (cells[at].stamp == stamp && cells[at].key != v) at = (at + 1) & mask;
      Scratch::Cell& cell = cells[at];
      if (cell.stamp != stamp) {
        cell = {v, stamp, u32(b.rows.size())};
        b.rows.push_back(Row{v, nullptr, nullptr, nullptr, nullptr, 0, 0, u16(t), 0});
      }
      b.inverse[i] = cell.index;
      ++b.rows[cell.index].count;
    }
  }
}

// Find the entries of rows[0 .. n). Rows follow one another in three steps, so that the memory of one loads
// while others take theirs. Weights are asked for by those who read them: earlier was slower.
inline void resolve_rows(Store& s, Row* rows, size_t n) {
  if (s.c.layout == kDense) {
    for (size_t i = 0; i < n; ++i) {
      if (i + 24 < n) __builtin_prefetch(&s.dense_entries[rows[i + 24].v]);
      s.resolve(rows[i]);
    }
    return;
  }
  constexpr size_t kAhead = 16;
  Home homes[2 * kAhead];
  const Directory& directory = *s.directory;
  for (size_t i = 0; i < n + 2 * kAhead; ++i) {
    if (i >= 2 * kAhead) {
      Row& r = rows[i - 2 * kAhead];
      s.take(r, directory.settle(homes[i % (2 * kAhead)], r.v, r.table));
    }
    if (i >= kAhead && i < n + kAhead) directory.look(homes[(i - kAhead) % (2 * kAhead)], rows[i - kAhead].v);
    if (i < n) {
      Home& home = homes[i % (2 * kAhead)];
      home = directory.home_of(rows[i].v);
      __builtin_prefetch(home.tags);
    }
  }
}
inline void resolve_all(Store& s, std::vector<Row>& rows) { resolve_rows(s, rows.data(), rows.size()); }

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

// out[bag][column[t] ...] of table t; offsets (absolute, [tables][bags + 1]) may be null.
inline void gather(const Store& s, const Batch& b, int t, const i64* offsets, i64 bags, float* out,
                   i64 stride, float mask_below) {
  const int k = s.tables[t].chunks, D = k * s.c.chunk;
  const u32 begin = b.table_start[t], end = b.table_start[t + 1];
  float* column = out + b.column[t];
  const bool plain = !offsets && b.scale.empty() && mask_below <= 0 && s.c.layout != kChunked && !s.c.half;
  auto plainly = [&](auto gather) { gather(b.rows.data(), b.inverse.data() + begin, end - begin, k, column, stride); };
  if (plain && s.c.chunk == 4) return plainly(gather_plain<4>);
  if (plain && s.c.chunk == 8) return plainly(gather_plain<8>);
  if (plain && s.c.chunk == 16) return plainly(gather_plain<16>);
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
    add_row(s, b.rows[b.inverse[i]], column + i64(b.bag[i]) * stride, b.scale.empty() ? 1.0f : b.scale[i], mask_below);
  }
}

}  // namespace fiited
