// Vectors of one instruction set, chosen by macros before this file is included (no include guard:
// lte_ffn.cpp includes it once per instruction set, each time inside another namespace).
//   LTE_AVX512: 16 lanes   LTE_AVX2: 8 lanes   neither: 8 lanes of plain C++
//   LTE_DOT_BF16: bfloat16 products by vdpbf16ps (with LTE_AVX512)

#if defined(LTE_AVX512)

constexpr int LANES = 16;
using V = __m512;
static inline V zero() { return _mm512_setzero_ps(); }
static inline V splat(float a) { return _mm512_set1_ps(a); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
static inline V load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V clamp(V a, float low, float high) {
  return _mm512_min_ps(_mm512_max_ps(a, splat(low)), splat(high));
}
static inline V round_even(V a) { return _mm512_roundscale_ps(a, 8); }
static inline V scale2(V a, V power) { return _mm512_scalef_ps(a, power); }
static inline __m256 half(V a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a),
                       _mm512_castps512_ps256(_mm512_shuffle_f32x4(a, a, 0x4E)));
}
static inline float sum(V a) { return _mm512_reduce_add_ps(a); }

#elif defined(LTE_AVX2)

constexpr int LANES = 8;
using V = __m256;
static inline V zero() { return _mm256_setzero_ps(); }
static inline V splat(float a) { return _mm256_set1_ps(a); }
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
static inline V load(const bf16* p) {
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V clamp(V a, float low, float high) {
  return _mm256_min_ps(_mm256_max_ps(a, splat(low)), splat(high));
}
static inline V round_even(V a) { return _mm256_round_ps(a, 8); }
static inline V scale2(V a, V power) {
  __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
}
static inline __m256 half(V a) { return a; }
static inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#else

constexpr int LANES = 8;
struct V {
  float v[LANES];
};
#define LTE_LANES for (int i = 0; i < LANES; ++i)
static inline V splat(float a) { V r; LTE_LANES r.v[i] = a; return r; }
static inline V zero() { return splat(0.0f); }
static inline V load(const float* p) { V r; LTE_LANES r.v[i] = p[i]; return r; }
static inline V load(const bf16* p) { V r; LTE_LANES r.v[i] = widen(p[i]); return r; }
static inline void store(float* p, V a) { LTE_LANES p[i] = a.v[i]; }
static inline V fma(V a, V b, V c) { V r; LTE_LANES r.v[i] = a.v[i] * b.v[i] + c.v[i]; return r; }
static inline V add(V a, V b) { V r; LTE_LANES r.v[i] = a.v[i] + b.v[i]; return r; }
static inline V mul(V a, V b) { V r; LTE_LANES r.v[i] = a.v[i] * b.v[i]; return r; }
static inline V div(V a, V b) { V r; LTE_LANES r.v[i] = a.v[i] / b.v[i]; return r; }
static inline float sum(V a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
static inline V exp_of(V a) { V r; LTE_LANES r.v[i] = std::exp(a.v[i]); return r; }
#undef LTE_LANES

#endif

#if defined(LTE_AVX512) || defined(LTE_AVX2)
// Cephes' expf: relative error below 2e-7 in the clamped range.
static inline V exp_of(V a) {
  a = clamp(a, -87.0f, 88.0f);
  V power = round_even(mul(a, splat(1.44269504f)));
  V r = fma(power, splat(-0.693359375f), a);
  r = fma(power, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return scale2(fma(mul(r, r), p, add(r, splat(1.0f))), power);
}

// Eight and four sums at once: half the shuffles of as many single ones.
static inline void sum8(const V* a, float* out) {
  __m256 s0 = _mm256_hadd_ps(half(a[0]), half(a[1])), s1 = _mm256_hadd_ps(half(a[2]), half(a[3]));
  __m256 s2 = _mm256_hadd_ps(half(a[4]), half(a[5])), s3 = _mm256_hadd_ps(half(a[6]), half(a[7]));
  __m256 t0 = _mm256_hadd_ps(s0, s1), t1 = _mm256_hadd_ps(s2, s3);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t0), _mm256_extractf128_ps(t0, 1)));
  _mm_storeu_ps(out + 4, _mm_add_ps(_mm256_castps256_ps128(t1), _mm256_extractf128_ps(t1, 1)));
}
static inline void sum4(const V* a, float* out) {
  __m256 s0 = _mm256_hadd_ps(half(a[0]), half(a[1])), s1 = _mm256_hadd_ps(half(a[2]), half(a[3]));
  __m256 t0 = _mm256_hadd_ps(s0, s1);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t0), _mm256_extractf128_ps(t0, 1)));
}
#else
static inline void sum8(const V* a, float* out) {
  for (int i = 0; i < 8; ++i) out[i] = sum(a[i]);
}
static inline void sum4(const V* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}
#endif
