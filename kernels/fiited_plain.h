// The common case of forward and backward, for chunks of a width known to the compiler: rows of one
// contiguous piece of fp32 weights, SGD or row-wise Adagrad, utilities of the gradient's norm. Rows
// have different lengths, so that a branch on one would be guessed wrong: whole rows are worked on, what
// is not alive is read from zeros and written to a place that nobody reads. The results are those of the
// general code, bit by bit.
#pragma once

#include "fiited_core.h"

namespace fiited {

template <int C> struct Chunk {
  static constexpr int step = C % kWide == 0 ? kWide : C % 8 == 0 && kWide > 8 ? 8 : 4, parts = C / step;
  using V = typename Lanes<step>::type;   // not std::conditional: its argument would lose the alignment of 4
  static const V& at(const float* from, int p) { return *reinterpret_cast<const V*>(from + p * step); }
  static V& at(float* to, int p) { return *reinterpret_cast<V*>(to + p * step); }
};

alignas(64) inline const float kNothing[64] = {};

// out[bag][column] of a table, one value per bag.
template <int C> inline void gather_plain(const Row* rows, const u32* inverse, u32 n, int k, float* column, i64 stride) {
  using K = Chunk<C>;
  for (u32 i = 0; i < n; ++i) {
    if (i + 16 < n) {
      const Row& ahead = rows[inverse[i + 16]];
      for (int j = 0; j < k; ++j) __builtin_prefetch(ahead.w + j * C * 4);
    }
    const Row& r = rows[inverse[i]];
    const float* const w = reinterpret_cast<const float*>(r.w);
    float* const out = column + i64(i) * stride;
    const int len = popcount(r.alive);
    for (int j = 0; j < k; ++j) {
      const float* const from = j < len ? w + j * C : kNothing;
      for (int p = 0; p < K::parts; ++p) K::at(out + j * C, p) = K::at(from, p);
    }
  }
}

inline v4 roots(v4 x) {
#ifdef __SSE2__
  return reinterpret_cast<v4>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  return v4{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])};
#endif
}

// One step of a resident row of four chunks; square holds the squared norms of g's chunks, kept the sum
// of those that are alive, `factor` what a norm is multiplied with before `unit` and the scale.
template <int C> inline void step_four(Store& s, const Row& r, const float* g, v4 square, float kept, float factor, float lr, float unit) {
  using K = Chunk<C>;
  alignas(64) float unread[C];
  const int len = popcount(r.alive);
  float row_step = lr;
  ++r.e->updates;
  if (s.c.optimizer == kRowwiseAdagrad && len) {
    r.e->acc += kept / float(len * C);
    row_step = lr / (std::sqrt(r.e->acc) + s.c.eps);
  }
  float* const w = reinterpret_cast<float*>(r.w);
  for (int j = 0; j < 4; ++j) {
    const float* const from = j < len ? w + j * C : kNothing;
    float* const to = j < len ? w + j * C : unread;
    for (int p = 0; p < K::parts; ++p) K::at(to, p) = K::at(from, p) - K::at(g + j * C, p) * row_step;
  }
  v4& u = *reinterpret_cast<v4*>(r.u);
  const i4 sign = reinterpret_cast<i4>(u) & i4{INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
  const v4 more = factor * roots(square) * unit * float(s.scale);
  u = u + reinterpret_cast<v4>(reinterpret_cast<i4>(more) | sign);
  r.e->touched = s.step;
}

}  // namespace fiited
