// Lookup and the fused backward pass: gather, sum of gradients per row, optimizer, utility.
#pragma once

#include "fiited_core.h"

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
  std::vector<u64> keys;
  std::vector<u32> stamps, index;
  u32 stamp = 0;
  void reserve(size_t n) {
    size_t size = 64;
    while (size < 2 * n) size *= 2;
    if (size > keys.size()) { keys.assign(size, 0); stamps.assign(size, 0); index.assign(size, 0); stamp = 0; }
    if (++stamp == 0) { std::fill(stamps.begin(), stamps.end(), 0); stamp = 1; }
    mask = size - 1;
  }
  size_t mask = 0;
  i64 bytes() const { return i64(keys.size()) * 16; }
};

inline void find_distinct(const Store& s, Batch& b, Scratch& scratch, const i64* ids, int t) {
  const u32 begin = b.table_start[t], end = b.table_start[t + 1];
  const TableConfig& table = s.tables[t];
  const bool dense = s.c.layout == kDense;
  scratch.reserve(end - begin);
  for (u32 i = begin; i < end; ++i) {
    const u64 v = dense ? u64(ids[i] + s.dense_offset[t]) : virtual_row(table, u64(ids[i]));
    size_t at = (dense ? v * kMixer >> 40 : v >> 20) & scratch.mask;
    while (scratch.stamps[at] == scratch.stamp && scratch.keys[at] != v) at = (at + 1) & scratch.mask;
    if (scratch.stamps[at] != scratch.stamp) {
      scratch.stamps[at] = scratch.stamp;
      scratch.keys[at] = v;
      scratch.index[at] = u32(b.rows.size());
      b.rows.push_back(Row{v, nullptr, nullptr, nullptr, nullptr, 0, 0, u16(t)});
    }
    b.inverse[i] = scratch.index[at];
    ++b.rows[scratch.index[at]].count;
  }
}

inline void resolve_all(Store& s, std::vector<Row>& rows) {
  const size_t n = rows.size();
  const bool dense = s.c.layout == kDense;
  for (size_t i = 0; i < n; ++i) {
    if (i + 24 < n) {
      if (dense) __builtin_prefetch(&s.dense_entries[rows[i + 24].v]);
      else __builtin_prefetch(s.directory->tag_line(rows[i + 24].v));
    }
    if (!dense && i + 12 < n)
      if (const Entry* e = s.directory->likely(rows[i + 12].v)) __builtin_prefetch(e);
    s.resolve(rows[i]);
  }
}

inline void prefetch_floats(const float* at, int floats) {
  for (int i = 0; i < floats; i += 16) __builtin_prefetch(at + i);
}
inline void prefetch_weights(const Store& s, const Row& r) {
  if (r.w) prefetch_floats(r.w, popcount(r.alive) * s.c.chunk * (1 + s.states));
  else if (r.refs)
    for (u32 m = r.alive; m; m &= m - 1) __builtin_prefetch(s.chunk_at(r, __builtin_ctz(m)));
}
inline void prefetch_entry(const Row& r) {
  __builtin_prefetch(r.e);
  __builtin_prefetch(r.u);
}

inline void copy_floats(float* out, const float* from, int floats) {   // floats is a multiple of 4
  int i = 0;
  for (; i + 8 <= floats; i += 8) *reinterpret_cast<v8*>(out + i) = *reinterpret_cast<const v8*>(from + i);
  for (; i < floats; i += 4) *reinterpret_cast<v4*>(out + i) = *reinterpret_cast<const v4*>(from + i);
}
inline void zero_floats(float* out, int floats) {
  int i = 0;
  for (; i + 8 <= floats; i += 8) *reinterpret_cast<v8*>(out + i) = v8{};
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
    copy_floats(out, r.w, floats);
    zero_floats(out + floats, k * C - floats);
    return;
  }
  for (int j = 0; j < k; ++j) {
    if ((r.alive >> j & 1) && !hidden(r, j, mask_below)) copy_floats(out + j * C, s.chunk_at(r, j), C);
    else zero_floats(out + j * C, C);
  }
}

inline void add_row(const Store& s, const Row& r, float* out, float scale, float mask_below) {
  if (!r.e) return;
  const int C = s.c.chunk;
  each_chunk(s, r, [&](int j, const float* w) {
    if (hidden(r, j, mask_below)) return;
    for (int i = 0; i < C; i += 4) {
      v4& target = *reinterpret_cast<v4*>(out + j * C + i);
      target = target + *reinterpret_cast<const v4*>(w + i) * scale;
    }
  });
}

// out[bag][column[t] ...] for every table; offsets (absolute, [tables][bags + 1]) may be null.
inline void gather(const Store& s, const Batch& b, const i64* offsets, i64 bags, float* out,
                   i64 stride, float mask_below) {
  for (int t = 0; t < s.c.tables; ++t) {
    const int k = s.tables[t].chunks;
    const u32 begin = b.table_start[t], end = b.table_start[t + 1];
    float* column = out + b.column[t];
    if (!offsets && b.scale.empty()) {
      for (u32 i = begin; i < end; ++i) {
        if (i + 10 < end) prefetch_weights(s, b.rows[b.inverse[i + 10]]);
        write_row(s, b.rows[b.inverse[i]], column + i64(i - begin) * stride, k, mask_below);
      }
      continue;
    }
    for (i64 bag = 0; bag < bags; ++bag) zero_floats(column + bag * stride, k * s.c.chunk);
    for (u32 i = begin; i < end; ++i) {
      if (i + 10 < end) prefetch_weights(s, b.rows[b.inverse[i + 10]]);
      add_row(s, b.rows[b.inverse[i]], column + i64(b.bag[i]) * stride, b.scale.empty() ? 1.0f : b.scale[i], mask_below);
    }
  }
}

inline float frequency(const Store& s, u32 count) {
  const float a = s.c.frequency_power;
  return a == 1.0f ? float(count) : a == 0.0f ? 1.0f : float(std::pow(double(count), double(a)));
}

// Increment of one chunk's utility; `norm` is the L2 norm of its gradient, `dot` is <g, w>.
inline float utility_step(const Store& s, float freq, u32 count, float norm, float dot, bool is_alive, float unit) {
  switch (s.c.utility) {
    case kGrad: return norm * unit;
    case kFreq: return float(count);
    case kSaliency: return ((is_alive ? std::fabs(dot) : 0.0f) + s.c.exploration * norm) * unit;
    default: return freq * norm * unit;
  }
}

template <int L> inline float dot_chunk(const float* a, const float* b, int C) {
  using V = typename Lanes<L>::type;
  V sum = *reinterpret_cast<const V*>(a) * *reinterpret_cast<const V*>(b);
  for (int i = L; i < C; i += L) sum = sum + *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(b + i);
  return sum_lanes(sum);
}

template <int L> inline void step_chunk(const Store& s, const Row& r, float* w, const float* g, float lr, float row_step,
                                        float bias1, float bias2) {
  using V = typename Lanes<L>::type;
  const int C = s.c.chunk;
  if (s.c.optimizer <= kRowwiseAdagrad) {
    for (int i = 0; i < C; i += L) {
      V& weight = *reinterpret_cast<V*>(w + i);
      weight = weight - *reinterpret_cast<const V*>(g + i) * row_step;
    }
    return;
  }
  const int stride = s.state_stride(*r.e);
  for (int i = 0; i < C; i += L) {
    V& weight = *reinterpret_cast<V*>(w + i);
    const V grad = *reinterpret_cast<const V*>(g + i);
    V& first = *reinterpret_cast<V*>(w + stride + i);
    V root;
    if (s.c.optimizer == kAdagrad) {
      first = first + grad * grad;
      for (int l = 0; l < L; ++l) root[l] = std::sqrt(first[l]) + s.c.eps;
      weight = weight - lr * grad / root;
      continue;
    }
    V& second = *reinterpret_cast<V*>(w + 2 * stride + i);
    first = first * s.c.beta1 + grad * (1.0f - s.c.beta1);
    second = second * s.c.beta2 + grad * grad * (1.0f - s.c.beta2);
    for (int l = 0; l < L; ++l) root[l] = std::sqrt(second[l] / bias2) + s.c.eps;
    weight = weight - lr * (first / bias1) / root;
  }
}

inline void miss(Store& s, const Row& r, float norm, float unit) {
  if (s.c.layout == kDense) return;
  const float scale = float(s.scale);
  const float amount = s.c.utility == kFreq ? float(r.count)
                     : s.c.utility == kSaliency ? s.c.exploration * norm * unit
                     : s.c.utility == kGrad ? norm * unit : frequency(s, r.count) * norm * unit;
  const Sighting seen = s.sketch->add(r.v, amount * scale, u32(mix(r.v + s.step)));
  const float score = std::max(seen.utility * s.tables[r.table].weight, 1e-37f);
  if (s.roomy() || (int(seen.count) >= s.c.admit_after && score > s.cut.score))
    if (i64(s.queue.size()) < s.c.slots) s.queue.push_back({r.v, score, r.table});
}

// One optimizer step of one row with summed gradient g. `missing` (or null) holds the gradient norms
// of chunks whose gradients did not travel. Returns false, with nothing changed, if g is not finite.
template <int L> inline bool apply_row(Store& s, Row& r, float* g, const float* missing, float lr, float unit) {
  const int C = s.c.chunk, k = s.tables[r.table].chunks;
  float square[kMaxChunks], total = 0, kept = 0;
  const u32 mask = r.alive;
  for (int j = 0; j < k; ++j) {
    square[j] = missing && !(mask >> j & 1) ? missing[j] * missing[j] : dot_chunk<L>(g + j * C, g + j * C, C);
    total += square[j];
    if (mask >> j & 1) kept += square[j];
  }
  if (!(total < INFINITY)) { ++s.n.nonfinite; return false; }
  if (!r.e) { miss(s, r, std::sqrt(total / float(k)), unit); return true; }
  if (s.c.clip > 0 && total > s.c.clip * s.c.clip) {
    const float shrink = s.c.clip / std::sqrt(total);
    for (int i = 0; i < k * C; ++i) g[i] *= shrink;
    for (int j = 0; j < k; ++j) square[j] *= shrink * shrink;
    kept *= shrink * shrink;
  }
  const float freq = frequency(s, r.count), scale = float(s.scale);
  float row_step = lr, bias1 = 1, bias2 = 1;
  ++r.e->updates;
  if (s.c.optimizer == kRowwiseAdagrad && mask) {
    r.e->acc += kept / float(popcount(mask) * C);
    row_step = lr / (std::sqrt(r.e->acc) + s.c.eps);
  } else if (s.c.optimizer == kAdam) {
    bias1 = float(1.0 - std::pow(double(s.c.beta1), double(r.e->updates)));
    bias2 = float(1.0 - std::pow(double(s.c.beta2), double(r.e->updates)));
  }
  for (int j = 0; j < k; ++j) {
    const bool is_alive = mask >> j & 1;
    float dot = 0;
    if (is_alive) {
      float* w = s.chunk_at(r, j);
      if (s.c.utility == kSaliency) dot = dot_chunk<L>(g + j * C, w, C);
      if (s.c.weight_decay > 0) for (int i = 0; i < C; ++i) g[j * C + i] += s.c.weight_decay * w[i];
      step_chunk<L>(s, r, w, g + j * C, lr, row_step, bias1, bias2);
    }
    const float more = utility_step(s, freq, r.count, std::sqrt(square[j]), dot, is_alive, unit) * scale;
    r.u[j] = is_alive ? r.u[j] - more : r.u[j] + more;   // the sign bit carries "alive"
  }
  r.e->touched = s.step;
  return true;
}

template <int L> inline i64 update_rows(Store& s, Batch& b, const float* grad, i64 stride, float lr, float unit) {
  using V = typename Lanes<L>::type;
  alignas(64) float sum[4096];
  i64 rejected = 0;
  const size_t n = b.rows.size();
  const bool copy = s.c.clip > 0 || s.c.weight_decay > 0;   // then apply_row writes into the gradient
  auto at = [&](u32 value) { return grad + i64(b.bag[value]) * stride; };
  for (size_t i = 0; i < n; ++i) {
    if (i + 24 < n) {   // the first line early: it warms the translation for the later ones
      prefetch_entry(b.rows[i + 24]);
      __builtin_prefetch(b.rows[i + 24].w);
    }
    if (i + 12 < n) {
      const Row& ahead = b.rows[i + 12];
      prefetch_weights(s, ahead);
      prefetch_floats(at(b.order[ahead.start]) + b.column[ahead.table], s.tables[ahead.table].chunks * s.c.chunk);
    }
    Row& r = b.rows[i];
    const int D = s.tables[r.table].chunks * s.c.chunk;
    const i64 column = b.column[r.table];
    float* g = sum;
    for (u32 p = r.start; p < r.start + r.count; ++p) {
      if (p + 6 < r.start + r.count) prefetch_floats(at(b.order[p + 6]) + column, D);
      const u32 value = b.order[p];
      const float* one = at(value) + column;
      if (b.scale.empty()) {
        if (r.count == 1 && !copy) { g = const_cast<float*>(one); break; }
        if (p == r.start) copy_floats(sum, one, D);
        else for (int d = 0; d < D; d += L) *reinterpret_cast<V*>(sum + d) += *reinterpret_cast<const V*>(one + d);
        continue;
      }
      const float weight = b.scale[value];
      if (p == r.start) for (int d = 0; d < D; d += L) *reinterpret_cast<V*>(sum + d) = *reinterpret_cast<const V*>(one + d) * weight;
      else for (int d = 0; d < D; d += L) *reinterpret_cast<V*>(sum + d) += *reinterpret_cast<const V*>(one + d) * weight;
    }
    rejected += !apply_row<L>(s, r, g, nullptr, lr, unit);
  }
  return rejected;
}

// Order values by distinct row, keeping the order of appearance inside a row.
inline void order_by_row(Batch& b) {
  u32 at = 0;
  for (Row& r : b.rows) { r.start = at; at += r.count; r.count = 0; }
  b.order.resize(b.inverse.size());
  for (u32 i = 0; i < b.inverse.size(); ++i) { Row& r = b.rows[b.inverse[i]]; b.order[r.start + r.count++] = i; }
}

}  // namespace fiited
