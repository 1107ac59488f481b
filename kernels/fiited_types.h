// Types shared by the parts of the virtually-hashed, physically-indexed (VHPI) embedding store:
// constants, the 64-bit mixer, entries of the directory, and vectors of a fixed lane order.
//
// Floating-point results do not depend on the instruction set: every sum runs over lanes of a
// fixed width (8, or 4 where the chunk is not a multiple of 8) and the build forbids contraction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// A function that only prefetches has no effect in gcc's eyes: unless it is inlined early, calls of it go.
#define FIITED_INLINE inline __attribute__((always_inline))

namespace fiited {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

constexpr int kMaxChunks = 15;    // bit 15 of Entry::alive marks a pinned row
constexpr u16 kPinned = 0x8000;
constexpr u16 kAliveMask = 0x7fff;
constexpr u64 kMixer = 0xd6e8feb86659fd93ull;
constexpr u64 kUnmixer = 0xcfee444d8b59a89bull;  // inverse of kMixer modulo 2^64
constexpr int kBins = 32768;      // upper 16 bits of a non-negative fp32 pattern

enum Layout { kSlabs = 0, kChunked = 1, kDense = 2 };
enum Optimizer { kSgd = 0, kRowwiseAdagrad = 1, kAdagrad = 2, kAdam = 3 };
enum Utility { kFreqGrad = 0, kGrad = 1, kFreq = 2, kSaliency = 3 };
enum Status {
  kOk = 0, kBadHandle = -1, kForked = -2, kUsed = -3, kNoMemory = -4, kCorrupt = -5,
  kNonFinite = -6, kFrozen = -7, kPinnedOverBudget = -8, kBadArgument = -9, kDuplicate = -10,
};

// Filled by the caller through ctypes: keep in step with raysys/training/fiited/native.py.
struct Config {
  i32 tables, chunk, max_chunks, layout, optimizer, utility, lifo, admit_after, min_alive, init;
  i32 poison, by_table, half;
  i64 slots, page_bytes, sketch_cells, budget_bytes;
  u64 seed;
  float frequency_power, exploration, gamma, hysteresis, churn_cap, slack;
  float eps, beta1, beta2, weight_decay, clip, acc0, init_scale;
};

struct TableConfig {
  u64 seed, virtual_rows;
  i64 dense_rows;
  i32 chunks;
  float weight;
};

struct Entry {   // 32 bytes, two per cache line
  u64 key;
  u32 slot;      // layout A: unused; layout B: page and index inside the class of the row's length
  float acc;     // row-wise optimizer state
  u16 alive;     // bitmap of chunks that own memory
  u16 table;
  u16 grown;     // low bits of the round of the latest growth
  u16 unused;
  u32 touched;   // step of the latest update
  u32 updates;   // optimizer steps of this row (Adam's bias correction)
};
static_assert(sizeof(Entry) == 32, "an entry is half a cache line");

inline u64 mix(u64 x) {
  x ^= x >> 32; x *= kMixer; x ^= x >> 32; x *= kMixer; x ^= x >> 32;
  return x;
}

inline u64 unmix(u64 x) {
  x ^= x >> 32; x *= kUnmixer; x ^= x >> 32; x *= kUnmixer; x ^= x >> 32;
  return x;
}

inline u64 virtual_row(const TableConfig& t, u64 id) {
  u64 v = mix(id ^ t.seed);
  return t.virtual_rows ? mix((v % t.virtual_rows) ^ t.seed) : v;
}

inline u32 bits_of(float x) { u32 b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(u32 b) { float x; std::memcpy(&x, &b, 4); return x; }
inline int popcount(u32 x) { return __builtin_popcount(x); }

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
// The widest that one register holds: gcc moves wider ones through the stack.
#if defined(__AVX512F__)
using Wide = v16;
#elif defined(__AVX2__)
using Wide = v8;
#else
using Wide = v4;
#endif
constexpr int kWide = sizeof(Wide) / sizeof(float);
typedef i32 i4 __attribute__((vector_size(16), aligned(4), may_alias));
// The signs of four lanes as bits.
inline u32 lanes(i4 a) {
#ifdef __SSE2__
  return u32(_mm_movemask_ps(reinterpret_cast<__m128>(a)));
#else
  return u32(a[0] < 0) | u32(a[1] < 0) << 1 | u32(a[2] < 0) << 2 | u32(a[3] < 0) << 3;
#endif
}

template <int L> struct Lanes;
template <> struct Lanes<16> { using type = v16; };
template <> struct Lanes<8> { using type = v8; };
template <> struct Lanes<4> { using type = v4; };

inline float sum_lanes(v4 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float sum_lanes(v8 a) {
  v4 low = {a[0], a[1], a[2], a[3]}, high = {a[4], a[5], a[6], a[7]};
  return sum_lanes(low + high);
}

inline v4 fold(v4 a) { return a; }
inline v4 fold(v8 a) { return v4{a[0], a[1], a[2], a[3]} + v4{a[4], a[5], a[6], a[7]}; }
// sum_lanes of four vectors at once: the same additions in the same order.
inline v4 sum_lanes(v4 a, v4 b, v4 c, v4 d) {
  const v4 even_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), odd_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const v4 even_cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), odd_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const v4 a0 = __builtin_shufflevector(even_ab, even_cd, 0, 1, 4, 5), a1 = __builtin_shufflevector(even_ab, even_cd, 2, 3, 6, 7);
  const v4 a2 = __builtin_shufflevector(odd_ab, odd_cd, 0, 1, 4, 5), a3 = __builtin_shufflevector(odd_ab, odd_cd, 2, 3, 6, 7);
  return (a0 + a2) + (a1 + a3);
}

// Deterministic uniform number in [0, 1) for element `index` of a row.
inline float unit_uniform(u64 row_seed, u32 index) {
  return float(mix(row_seed + u64(index) * 0x9E3779B97F4A7C15ull) >> 40) * 0x1p-24f;
}

inline float bfloat_to_float(u16 b) { return float_of(u32(b) << 16); }
// Stochastic rounding: `noise` is uniform in [0, 2^16), so the expected value is exact.
inline u16 float_to_bfloat(float x, u32 noise) { return u16((bits_of(x) + (noise & 0xffff)) >> 16); }

inline float half_to_float(u16 h) {
  u32 exponent = (h >> 10) & 31, fraction = h & 1023, sign = u32(h & 0x8000) << 16;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
  float small = float(fraction) * 0x1p-24f;
  return sign ? -small : small;
}

}  // namespace fiited
