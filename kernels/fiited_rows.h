// The fused backward pass: sum of gradients per row, optimizer, utility.
#pragma once

#include "fiited_lookup.h"

namespace fiited {

FIITED_INLINE void prefetch_entry(const Row& r) {
  __builtin_prefetch(r.e, 1);
  __builtin_prefetch(r.u, 1);
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

template <int L> inline typename Lanes<L>::type dot_lanes(const float* a, const float* b, int C) {
  using V = typename Lanes<L>::type;
  V sum = *reinterpret_cast<const V*>(a) * *reinterpret_cast<const V*>(b);
  for (int i = L; i < C; i += L) sum = sum + *reinterpret_cast<const V*>(a + i) * *reinterpret_cast<const V*>(b + i);
  return sum;
}
template <int L> inline float dot_chunk(const float* a, const float* b, int C) { return sum_lanes(dot_lanes<L>(a, b, C)); }

// Squared norm of each of the k chunks, four chunks at a time.
template <int L> inline void chunk_squares(const float* g, int C, int k, float* square) {
  int j = 0;
  for (; j + 4 <= k; j += 4) {
    const float* at = g + j * C;
    *reinterpret_cast<v4*>(square + j) =
        sum_lanes(fold(dot_lanes<L>(at, at, C)), fold(dot_lanes<L>(at + C, at + C, C)),
                  fold(dot_lanes<L>(at + 2 * C, at + 2 * C, C)), fold(dot_lanes<L>(at + 3 * C, at + 3 * C, C)));
  }
  for (; j < k; ++j) square[j] = dot_chunk<L>(g + j * C, g + j * C, C);
}

// SGD or row-wise Adagrad over the contiguous weights of a row.
inline void step_contiguous(float* w, const float* g, int floats, float row_step) {
  int i = 0;
  for (; i + kWide <= floats; i += kWide) {
    Wide& weight = *reinterpret_cast<Wide*>(w + i);
    weight = weight - *reinterpret_cast<const Wide*>(g + i) * row_step;
  }
  for (; i < floats; i += 4) {
    v4& weight = *reinterpret_cast<v4*>(w + i);
    weight = weight - *reinterpret_cast<const v4*>(g + i) * row_step;
  }
}

template <int L> inline void step_chunk(const Store& s, const Row& r, int j, float* w, const float* g, float lr,
                                        float row_step, float bias1, float bias2) {
  using V = typename Lanes<L>::type;
  const int C = s.c.chunk;
  if (s.c.optimizer <= kRowwiseAdagrad) {
    for (int i = 0; i < C; i += L) {
      V& weight = *reinterpret_cast<V*>(w + i);
      weight = weight - *reinterpret_cast<const V*>(g + i) * row_step;
    }
    return;
  }
  float* const state = s.state_at(r, j, 0);
  float* const other = s.c.optimizer == kAdam ? s.state_at(r, j, 1) : nullptr;
  for (int i = 0; i < C; i += L) {
    V& weight = *reinterpret_cast<V*>(w + i);
    const V grad = *reinterpret_cast<const V*>(g + i);
    V& first = *reinterpret_cast<V*>(state + i);
    V root;
    if (s.c.optimizer == kAdagrad) {
      first = first + grad * grad;
      for (int l = 0; l < L; ++l) root[l] = std::sqrt(first[l]) + s.c.eps;
      weight = weight - lr * grad / root;
      continue;
    }
    V& second = *reinterpret_cast<V*>(other + i);
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

// Utilities of a row whose increments need no weights; u < 0 is a chunk that is alive.
inline void add_utilities(const Store& s, Row& r, int k, const float* square, float freq, float unit) {
  const float scale = float(s.scale);
  for (int j = 0; j < k; ++j) {
    const float more = utility_step(s, freq, r.count, std::sqrt(square[j]), 0.0f, true, unit) * scale;
    r.u[j] += std::copysign(more, r.u[j]);
  }
}

// Rows of one contiguous piece under SGD or row-wise Adagrad: the common case, and the fast one.
inline bool is_plain(const Store& s, const Row& r) {
  return r.w && s.c.optimizer <= kRowwiseAdagrad && s.c.utility != kSaliency && !(s.c.weight_decay > 0);
}

inline u32 row_noise(const Store& s, const Row& r) { return noise_seed(r.e->key, s.c.seed, s.step); }

template <int L> inline void step_each(Store& s, Row& r, float* g, const float* square, float freq, float lr,
                                       float row_step, float unit) {
  const int C = s.c.chunk, k = s.tables[r.table].chunks;
  const float scale = float(s.scale);
  alignas(64) float wide[4096];
  const u32 noise = s.c.half ? row_noise(s, r) : 0;
  float bias1 = 1, bias2 = 1;
  if (s.c.optimizer == kAdam) {
    bias1 = float(1.0 - std::pow(double(s.c.beta1), double(r.e->updates)));
    bias2 = float(1.0 - std::pow(double(s.c.beta2), double(r.e->updates)));
  }
  for (int j = 0; j < k; ++j) {
    const bool is_alive = r.alive >> j & 1;
    float dot = 0;
    if (is_alive) {
      u8* const stored = s.chunk_at(r, j);
      float* w = s.c.half ? wide : reinterpret_cast<float*>(stored);
      if (s.c.half) widen(wide, reinterpret_cast<const u16*>(stored), C);
      if (s.c.utility == kSaliency) dot = dot_chunk<L>(g + j * C, w, C);
      if (s.c.weight_decay > 0) for (int i = 0; i < C; ++i) g[j * C + i] += s.c.weight_decay * w[i];
      step_chunk<L>(s, r, j, w, g + j * C, lr, row_step, bias1, bias2);
      if (s.c.half) narrow_noisy(reinterpret_cast<u16*>(stored), wide, C, noise, u32(j * C));
    }
    const float more = utility_step(s, freq, r.count, std::sqrt(square[j]), dot, is_alive, unit) * scale;
    r.u[j] = is_alive ? r.u[j] - more : r.u[j] + more;   // the sign bit carries "alive"
  }
}

// apply_row in the case of fiited_plain.h: four chunks of C floats.
template <int L, int C> inline bool apply_four(Store& s, Row& r, const float* g, float lr, float unit) {
  alignas(16) float square[4];
  float total = 0, kept = 0;
  chunk_squares<L>(g, C, 4, square);
  for (int j = 0; j < 4; ++j) {
    total += square[j];
    kept += r.alive >> j & 1 ? square[j] : 0.0f;
  }
  if (!(total < INFINITY)) { ++s.n.nonfinite; return false; }
  if (!r.e) { miss(s, r, std::sqrt(total / 4.0f), unit); return true; }
  step_four<C>(s, r, g, *reinterpret_cast<const v4*>(square), kept, s.c.utility == kGrad ? 1.0f : frequency(s, r.count), lr, unit);
  return true;
}
inline bool all_four(const Store& s) {
  for (const TableConfig& t : s.tables) if (t.chunks != 4) return false;
  return s.c.layout != kChunked && !(s.c.weight_decay > 0) && !(s.c.clip > 0);
}
inline bool all_plain(const Store& s) {
  return all_four(s) && s.c.optimizer <= kRowwiseAdagrad && s.c.utility <= kGrad && !s.c.half;
}

// One optimizer step of one row with summed gradient g. `missing` (or null) holds the gradient norms
// of chunks whose gradients did not travel. Returns false, with nothing changed, if g is not finite.
template <int L> inline bool apply_row(Store& s, Row& r, float* g, const float* missing, float lr, float unit) {
  const int C = s.c.chunk, k = s.tables[r.table].chunks;
  alignas(16) float square[kMaxChunks + 1];
  float total = 0, kept = 0;
  const u32 mask = r.alive;
  chunk_squares<L>(g, C, k, square);
  for (int j = 0; j < k; ++j) {
    if (missing && !(mask >> j & 1)) square[j] = missing[j] * missing[j];
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
  const float freq = frequency(s, r.count);
  float row_step = lr;
  ++r.e->updates;
  if (s.c.optimizer == kRowwiseAdagrad && mask) {
    r.e->acc += kept / float(popcount(mask) * C);
    row_step = lr / (std::sqrt(r.e->acc) + s.c.eps);
  }
  if (is_plain(s, r)) {
    const int floats = popcount(mask) * C;
    if (s.c.half) step_contiguous_half(reinterpret_cast<u16*>(r.w), g, floats, row_step, row_noise(s, r));
    else step_contiguous(reinterpret_cast<float*>(r.w), g, floats, row_step);
    add_utilities(s, r, k, square, freq, unit);
  } else step_each<L>(s, r, g, square, freq, lr, row_step, unit);
  r.e->touched = s.step;
  return true;
}

// Sum of the gradients of a row's values, in order of appearance; in registers, 64 floats at a time.
inline void sum_values(const Batch& b, const Row& r, const float* grad, i64 stride, int D, float* sum) {
  const u32* order = b.order.data() + r.start;
  const float* column = grad + b.column[r.table];
  auto at = [&](u32 p) { return column + i64(order[p]) * stride; };
  int d = 0;
  for (; d + 64 <= D; d += 64) {
    constexpr int parts = 64 / kWide;
    Wide part[parts];
    for (int q = 0; q < parts; ++q) part[q] = *reinterpret_cast<const Wide*>(at(0) + d + kWide * q);
    for (u32 p = 1; p < r.count; ++p) {
      if (p + 8 < r.count) prefetch_floats(at(p + 8) + d, 64);
      for (int q = 0; q < parts; ++q) part[q] = part[q] + *reinterpret_cast<const Wide*>(at(p) + d + kWide * q);
    }
    for (int q = 0; q < parts; ++q) *reinterpret_cast<Wide*>(sum + d + kWide * q) = part[q];
  }
  if (d == D) return;
  for (u32 p = 0; p < r.count; ++p) {
    const float* one = at(p);
    for (int i = d; i < D; i += 4) {
      v4& target = *reinterpret_cast<v4*>(sum + i);
      const v4 more = *reinterpret_cast<const v4*>(one + i);
      target = p ? target + more : more;
    }
  }
}

// update_rows for rows of four chunks of C floats, one piece each, without weights of values; `plain`: the case
// of fiited_plain.h. A row's memory is asked for kAhead rows before its turn.
template <int L, int C, bool plain> inline i64 update_four(Store& s, Batch& b, const float* grad, i64 stride, float lr, float unit) {
  constexpr u32 kAhead = 16;
  constexpr int parts = 4 * C / Chunk<C>::step;
  using K = Chunk<C>;
  alignas(64) float sum[4 * C];
  i64 rejected = 0;
  const u32 n = u32(b.rows.size());
  const Row* const rows = b.rows.begin();
  const u32* const order = b.order.data();   // bags: no value has a weight
  const i64* const columns = b.column.data();
  const int chunk_bytes = plain ? C * 4 : s.chunk_bytes;
  for (u32 i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      const Row& ahead = rows[i + kAhead];
      const float* const column = grad + columns[ahead.table];
      for (u32 p = 0; p < ahead.count && p < 4; ++p) {
        const float* const one = column + i64(order[ahead.start + p]) * stride;
        for (int f = 0; f < 4 * C; f += 16) __builtin_prefetch(one + f);
      }
      if (ahead.e) {
        __builtin_prefetch(ahead.e);
        __builtin_prefetch(ahead.u);
        for (int byte = 0; byte < popcount(ahead.alive) * chunk_bytes; byte += 64) __builtin_prefetch(ahead.w + byte);
      } else if (s.sketch) s.sketch->prefetch(ahead.v);
    }
    Row& r = b.rows[i];
    const float* const column = grad + columns[r.table];
    const u32* const value = order + r.start;
    float* g = const_cast<float*>(column + i64(value[0]) * stride);   // not written to: nothing here clips or decays
    if (r.count > 1) {
      typename K::V part[parts];
      for (int q = 0; q < parts; ++q) part[q] = K::at(g, q);
      for (u32 p = 1; p < r.count; ++p) {
        if (p + 8 < r.count) {
          const float* const one = column + i64(value[p + 8]) * stride;
          for (int f = 0; f < 4 * C; f += 16) __builtin_prefetch(one + f);
        }
        const float* const one = column + i64(value[p]) * stride;
        for (int q = 0; q < parts; ++q) part[q] = part[q] + K::at(one, q);
      }
      for (int q = 0; q < parts; ++q) K::at(sum, q) = part[q];
      g = sum;
    }
    rejected += plain ? !apply_four<L, C>(s, r, g, lr, unit) : !apply_row<L>(s, r, g, nullptr, lr, unit);
  }
  return rejected;
}

template <int L> inline i64 update_rows(Store& s, Batch& b, const float* grad, i64 stride, float lr, float unit) {
  using V = typename Lanes<L>::type;
  alignas(64) float sum[4096];
  i64 rejected = 0;
  const size_t n = b.rows.size();
  const bool plain = all_plain(s);
  if (b.scale.empty() && all_four(s)) {
    auto update = [&](auto rows_of) { return rows_of(s, b, grad, stride, lr, unit); };
    if (s.c.chunk == 16) return update(plain ? update_four<L, 16, true> : update_four<L, 16, false>);
    if (s.c.chunk == L) return update(plain ? update_four<L, L, true> : update_four<L, L, false>);
  }
  const bool copy = s.c.clip > 0 || s.c.weight_decay > 0;   // then apply_row writes into the gradient
  auto at = [&](u32 value) { return grad + i64(b.scale.empty() ? value : b.bag[value]) * stride; };   // of b.order
  for (size_t i = 0; i < n; ++i) {
    if (i + 48 < n) {   // the first line early: it warms the translation for the later ones
      const Row& ahead = b.rows[i + 48];
      if (ahead.e) {
        prefetch_entry(ahead);
        __builtin_prefetch(ahead.w, 1);
      } else if (s.sketch) s.sketch->prefetch(ahead.v);
    }
    if (i + 24 < n) {
      const Row& ahead = b.rows[i + 24];
      prefetch_weights(s, ahead, 1 + s.states);
      for (u32 p = 0; p < std::min(ahead.count, 4u); ++p)
        prefetch_floats(at(b.order[ahead.start + p]) + b.column[ahead.table], s.tables[ahead.table].chunks * s.c.chunk);
    }
    Row& r = b.rows[i];
    const int D = s.tables[r.table].chunks * s.c.chunk;
    const i64 column = b.column[r.table];
    float* g = sum;
    if (b.scale.empty() && r.count == 1 && !copy) g = const_cast<float*>(at(b.order[r.start]) + column);
    else if (b.scale.empty()) sum_values(b, r, grad, stride, D, sum);
    else for (u32 p = r.start; p < r.start + r.count; ++p) {
      const u32 value = b.order[p];
      const float* one = at(value) + column;
      const float weight = b.scale[value];
      if (p == r.start) for (int d = 0; d < D; d += L) *reinterpret_cast<V*>(sum + d) = *reinterpret_cast<const V*>(one + d) * weight;
      else for (int d = 0; d < D; d += L) *reinterpret_cast<V*>(sum + d) += *reinterpret_cast<const V*>(one + d) * weight;
    }
    if (plain && s.c.chunk == 16) rejected += !apply_four<L, 16>(s, r, g, lr, unit);
    else if (plain && s.c.chunk == L) rejected += !apply_four<L, L>(s, r, g, lr, unit);
    else rejected += !apply_row<L>(s, r, g, nullptr, lr, unit);
  }
  return rejected;
}

}  // namespace fiited
