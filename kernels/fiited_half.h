// Weights stored as bfloat16: read as fp32, computed in fp32, written back by stochastic rounding.
// The noise of a weight is a function of (row, step, element), so results depend neither on the
// instruction set nor on the layout, the order of rows or the number of shards.
#pragma once

#include "fiited_types.h"

namespace fiited {

typedef u16 h16 __attribute__((vector_size(32), aligned(4), may_alias));
typedef u16 h8 __attribute__((vector_size(16), aligned(4), may_alias));
typedef u16 h4 __attribute__((vector_size(8), aligned(4), may_alias));
typedef u32 u16x __attribute__((vector_size(64), aligned(4), may_alias));
typedef u32 u8x __attribute__((vector_size(32), aligned(4), may_alias));
typedef u32 u4x __attribute__((vector_size(16), aligned(4), may_alias));
typedef u32 u2x __attribute__((vector_size(8), aligned(4), may_alias));

template <class V> inline V scatter_bits(V h) {   // a 32-bit mixer, lane by lane
  h ^= h >> 16; h *= 0x21f0aaadu; h ^= h >> 15; h *= 0xd35a2d97u; h ^= h >> 15;
  return h;
}

// One hash serves two neighbouring elements: its low half the even one, its high half the odd one.
inline u32 noise_seed(u64 v, u64 seed, u32 step) {
  return u32(mix(v ^ (seed + (u64(step) + 1) * 0x9E3779B97F4A7C15ull)) >> 32);
}
#ifdef __AVX512F__   // gcc moves vectors wider than a register through the stack
inline h16 noise_of_16(u32 seed, u32 element) {
  const u8x pair = u8x{0, 1, 2, 3, 4, 5, 6, 7} + element / 2;
  return reinterpret_cast<h16>(scatter_bits(pair * 0x9E3779B9u + seed));
}
#endif
inline h8 noise_of_8(u32 seed, u32 element) {
  const u4x pair = u4x{0, 1, 2, 3} + element / 2;
  return reinterpret_cast<h8>(scatter_bits(pair * 0x9E3779B9u + seed));
}
inline h4 noise_of_4(u32 seed, u32 element) {
  const u2x pair = u2x{0, 1} + element / 2;
  return reinterpret_cast<h4>(scatter_bits(pair * 0x9E3779B9u + seed));
}

#ifdef __AVX512F__
inline v16 widen_16(const u16* w) {
  return reinterpret_cast<v16>(__builtin_convertvector(*reinterpret_cast<const h16*>(w), u16x) << 16);
}
#endif
inline v8 widen_8(const u16* w) {
  return reinterpret_cast<v8>(__builtin_convertvector(*reinterpret_cast<const h8*>(w), u8x) << 16);
}
inline v4 widen_4(const u16* w) {
  return reinterpret_cast<v4>(__builtin_convertvector(*reinterpret_cast<const h4*>(w), u4x) << 16);
}
#ifdef __AVX512F__
inline void narrow_16(u16* w, v16 x, h16 noise) {
  const u16x bits = reinterpret_cast<u16x>(x) + __builtin_convertvector(noise, u16x);
  *reinterpret_cast<h16*>(w) = __builtin_convertvector(bits >> 16, h16);
}
#endif
inline void narrow_8(u16* w, v8 x, h8 noise) {
  const u8x bits = reinterpret_cast<u8x>(x) + __builtin_convertvector(noise, u8x);
  *reinterpret_cast<h8*>(w) = __builtin_convertvector(bits >> 16, h8);
}
inline void narrow_4(u16* w, v4 x, h4 noise) {
  const u4x bits = reinterpret_cast<u4x>(x) + __builtin_convertvector(noise, u4x);
  *reinterpret_cast<h4*>(w) = __builtin_convertvector(bits >> 16, h4);
}

inline void widen(float* out, const u16* w, int n) {   // n is a multiple of 4, as everywhere here
  int i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) *reinterpret_cast<v16*>(out + i) = widen_16(w + i);
#endif
  for (; i + 8 <= n; i += 8) *reinterpret_cast<v8*>(out + i) = widen_8(w + i);
  for (; i < n; i += 4) *reinterpret_cast<v4*>(out + i) = widen_4(w + i);
}
// Stochastic rounding of elements `first`, `first + 1`, ... of a row; first is a multiple of 4.
inline void narrow_noisy(u16* w, const float* x, int n, u32 seed, u32 first) {
  int i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) narrow_16(w + i, *reinterpret_cast<const v16*>(x + i), noise_of_16(seed, first + u32(i)));
#endif
  for (; i + 8 <= n; i += 8) narrow_8(w + i, *reinterpret_cast<const v8*>(x + i), noise_of_8(seed, first + u32(i)));
  for (; i < n; i += 4) narrow_4(w + i, *reinterpret_cast<const v4*>(x + i), noise_of_4(seed, first + u32(i)));
}
// To the nearest, ties to even: first values and what is loaded.
inline void narrow_nearest(u16* w, const float* x, int n) {
  for (int i = 0; i < n; ++i) {
    const u32 bits = bits_of(x[i]);
    w[i] = u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// SGD or row-wise Adagrad over the contiguous weights of a row, from element 0.
inline void step_contiguous_half(u16* w, const float* g, int n, float row_step, u32 seed) {
  int i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16)
    narrow_16(w + i, widen_16(w + i) - *reinterpret_cast<const v16*>(g + i) * row_step, noise_of_16(seed, u32(i)));
#endif
  for (; i + 8 <= n; i += 8)
    narrow_8(w + i, widen_8(w + i) - *reinterpret_cast<const v8*>(g + i) * row_step, noise_of_8(seed, u32(i)));
  for (; i < n; i += 4)
    narrow_4(w + i, widen_4(w + i) - *reinterpret_cast<const v4*>(g + i) * row_step, noise_of_4(seed, u32(i)));
}

}  // namespace fiited
