// The common case of forward and backward, for chunks of a width known to the compiler: rows of one
// contiguous piece of fp32 weights, SGD or row-wise Adagrad, utilities of the gradient's norm. Rows
// have different lengths, so that a branch on one would be guessed wrong: whole rows are worked on, what
// is not alive is read from zeros and written to a place that nobody reads. The results are those of the
// general code, bit by bit.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <type_traits>

#include "fiited_core.h"

namespace fiited {

template <int C> struct Chunk {
  static constexpr int step = C % kWide == 0 ? kWide : C % 8 == 0 && kWide > 8 ? 8 : 4, parts = C / step;
  using V = typename Lanes<step>::type;   // not std::conditional: its argument would lose the alignment of 4
  static const V& at(const float* from, int p) { return *reinterpret_cast<const V*>(from + p * step); }
  static V& at(float* to, int p) { return *reinterpret_cast<V*>(to + p * step); }
  static V widen(const u16* from, int p) {
#ifdef __AVX512F__
    if constexpr (step == 16) return widen_16(from + p * step);
    else
#endif
    if constexpr (step == 8) return widen_8(from + p * step);
    else return widen_4(from + p * step);
  }
};

alignas(64) inline const float kNothing[64] = {};

constexpr i64 kStreamFrom = i64(4) << 20;   // bytes of an output

// A store that does not bring the line into the cache first; `to` begins a whole vector.
template <class V> inline void stream_to(float* to, const V& value) {
#ifdef __SSE2__
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) { _mm512_stream_ps(to, reinterpret_cast<__m512>(value)); return; }
#endif
#ifdef __AVX__
  if constexpr (sizeof(V) == 32) { _mm256_stream_ps(to, reinterpret_cast<__m256>(value)); return; }
#endif
  if constexpr (sizeof(V) == 16) { _mm_stream_ps(to, reinterpret_cast<__m128>(value)); return; }
#endif
  *reinterpret_cast<V*>(to) = value;
}
inline void stream_end() {   // orders streamed stores before what follows
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// out[bag][column] of a table, one value per bag.
template <int C, bool kHalf, bool kStream>
inline void gather_plain(const Row* rows, const u32* inverse, u32 n, int k, float* column, i64 stride) {
  using K = Chunk<C>;
  constexpr int kBytes = C * (kHalf ? 2 : 4);
  for (u32 i = 0; i < n; ++i) {
    if (i + 16 < n) {
      const Row& ahead = rows[inverse[i + 16]];
      for (int byte = 0; byte < k * kBytes; byte += kBytes < 64 ? kBytes : 64) __builtin_prefetch(ahead.w + byte);
    }
    const Row& r = rows[inverse[i]];
    float* const out = column + i64(i) * stride;
    const int len = popcount(r.alive);
    for (int j = 0; j < k; ++j) {
      const u8* const from = j < len ? r.w + j * kBytes : reinterpret_cast<const u8*>(kNothing);
      for (int p = 0; p < K::parts; ++p) {
        typename K::V value;
        if constexpr (kHalf) value = K::widen(reinterpret_cast<const u16*>(from), p);
        else value = K::at(reinterpret_cast<const float*>(from), p);
        if (kStream) stream_to(out + j * C + p * K::step, value);
        else K::at(out + j * C, p) = value;
      }
    }
  }
  if (kStream) stream_end();
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
