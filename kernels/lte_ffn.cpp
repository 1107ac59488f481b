// LTE's FFN on a CPU: router, selection and the chosen experts in one call.
//
// Reference twin: raysys/ops/lte_reference.py. Plain C interface, loaded by raysys/ops/lte_native.py.
// One library holds four instruction sets, chosen per call: plain C++, AVX2, AVX-512, AVX-512 with
// bfloat16 products. Sums are float32. A result depends on the instruction set and on the number of
// threads only, never on timing: work is cut in advance, partial sums are added in a fixed order.

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define LTE_X86 1
#endif

#include "lte_types.h"
#include "lte_pool.h"

namespace lte {

namespace portable {
#include "lte_vector.h"
#include "lte_core.h"
}  // namespace portable

#if LTE_X86
#if defined(__clang__)
#define LTE_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define LTE_BEGIN_AVX512 _Pragma( \
    "clang attribute push(__attribute__((target(\"avx2,fma,avx512f,avx512bw,avx512vl,avx512dq\"))), apply_to = function)")
#define LTE_BEGIN_BF16 _Pragma( \
    "clang attribute push(__attribute__((target(\"avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\"))), apply_to = function)")
#define LTE_END _Pragma("clang attribute pop")
#else
#define LTE_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define LTE_BEGIN_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512vl,avx512dq\")")
#define LTE_BEGIN_BF16        \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\")")
#define LTE_END _Pragma("GCC pop_options")
#endif

LTE_BEGIN_AVX2
namespace avx2 {
#define LTE_AVX2 1
#include "lte_vector.h"
#include "lte_core.h"
#undef LTE_AVX2
}  // namespace avx2
LTE_END

#define LTE_AVX512 1
LTE_BEGIN_AVX512
namespace avx512 {
#include "lte_vector.h"
#include "lte_core.h"
}  // namespace avx512
LTE_END

LTE_BEGIN_BF16
namespace avx512bf16 {
#define LTE_DOT_BF16 1
#include "lte_vector.h"
#include "lte_core.h"
#undef LTE_DOT_BF16
}  // namespace avx512bf16
LTE_END
#undef LTE_AVX512
#endif

static const Kernels& kernels_of(int isa) {
#if LTE_X86
  if (isa == 3) return avx512bf16::KERNELS;
  if (isa == 2) return avx512::KERNELS;
  if (isa == 1) return avx2::KERNELS;
#endif
  (void)isa;
  return portable::KERNELS;
}

// Where to cut experts into `parts` ranges of about equal work.
static std::vector<int64_t> cut(const int32_t* offsets, int64_t n, int parts) {
  std::vector<int64_t> at(parts + 1, n);
  at[0] = 0;
  int64_t e = 0;
  for (int p = 1; p < parts; ++p) {
    const int64_t want = int64_t(offsets[n]) * p / parts;
    while (e < n && offsets[e] < want) ++e;
    at[p] = e;
  }
  return at;
}

static void route(const Kernels& k, const Layer& l, const Inputs& x, int64_t T, float threshold,
                  int threads, int32_t* offsets, int32_t* tokens) {
  std::vector<uint8_t>& mask = scratch_of_thread().mask;
  mask.resize(size_t(l.n * T));
  uint8_t* m = mask.data();
  // Small routers take less time than waking a thread.
  const int parts = l.n * T * l.d < (1 << 21) ? 1 : int(std::min<int64_t>(threads, l.n));
  parallel(parts, [&](int p) {
    k.route(l, x, T, l.n * p / parts, l.n * (p + 1) / parts, threshold, m);
  });
  int32_t count = 0;
  for (int64_t e = 0; e < l.n; ++e) {
    offsets[e] = count;
    for (int64_t t = 0; t < T; ++t)
      if (m[e * T + t]) tokens[count++] = int32_t(t);
  }
  offsets[l.n] = count;
}

static void compute(const Kernels& k, const Layer& l, const Inputs& x, int64_t T, int threads,
                    const int32_t* offsets, const int32_t* tokens, void* y) {
  const int64_t work = int64_t(offsets[l.n]) * l.E * l.d * (l.gated ? 3 : 2);
  int parts = int(std::min<int64_t>(threads, l.n));
  if (work < (1 << 19)) parts = 1;  // about 50 microseconds
  const std::vector<int64_t> at = cut(offsets, l.n, parts);
  Scratch& scratch = scratch_of_thread();
  const int64_t size = T * l.d;
  float* sums = scratch.floats(3, size * parts);
  std::memset(sums, 0, size_t(size * parts) * sizeof(float));
  parallel(parts, [&](int p) {
    if (at[p] < at[p + 1]) k.experts(l, x, offsets, tokens, at[p], at[p + 1], sums + p * size);
  });
  for (int p = 1; p < parts; ++p)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[p * size + i];
  std::vector<float>& row = scratch.row;
  row.resize(size_t(l.d));
  for (int64_t t = 0; t < T; ++t) {
    if (l.dtype == F32) {
      k.finish(l, sums + t * l.d, static_cast<float*>(y) + t * l.d);
    } else {
      k.finish(l, sums + t * l.d, row.data());
      bf16* out = static_cast<bf16*>(y) + t * l.d;
      for (int64_t i = 0; i < l.d; ++i) out[i] = narrow(row[size_t(i)]);
    }
  }
}

static Inputs inputs_of(const Kernels& k, const Layer& l, const void* x, int64_t T, bool routes) {
  Inputs in{x, static_cast<const float*>(x)};
  if (l.dtype == BF16) {
    const bool needs = !k.direct_bf16 || (routes && l.router_dtype == F32);
    in.f32 = needs ? k.widen(x, T * l.d) : nullptr;
  }
  return in;
}

}  // namespace lte

extern "C" {

using namespace lte;

// Best instruction set of this processor: 0 portable, 1 AVX2, 2 AVX-512, 3 with bfloat16 products.
int lte_best_isa(void) {
#if LTE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
  if (avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

// Expert-to-token lists: offsets int32 [n + 1], tokens int32 [n * T], both ascending. Returns nnz.
int64_t lte_route(const Layer* l, const void* x, int64_t T, float threshold, int isa, int threads,
                  int32_t* offsets, int32_t* tokens) {
  const Kernels& k = kernels_of(isa);
  route(k, *l, inputs_of(k, *l, x, T, true), T, threshold, threads, offsets, tokens);
  return offsets[l->n];
}

// y [T, d] from given lists.
void lte_masked(const Layer* l, const void* x, int64_t T, int isa, int threads,
                const int32_t* offsets, const int32_t* tokens, void* y) {
  const Kernels& k = kernels_of(isa);
  compute(k, *l, inputs_of(k, *l, x, T, false), T, threads, offsets, tokens, y);
}

// The dense path's middle, in place: z [T, f] = act(z) (* up) where an expert is on, else 0. Null
// lists are those that this thread's latest lte_ffn kept.
void lte_activate(const Layer* l, void* z, const void* up, int64_t T, int isa, int threads,
                  const int32_t* offsets, const int32_t* tokens) {
  const Kernels& k = kernels_of(isa);
  if (!offsets) {
    offsets = scratch_of_thread().lists.data();
    tokens = offsets + l->n + 1;
  }
  const int parts = T * l->f < (1 << 16) ? 1 : int(std::min<int64_t>(threads, l->n));
  parallel(parts, [&](int p) {
    k.activate(*l, z, up, T, offsets, tokens, l->n * p / parts, l->n * (p + 1) / parts);
  });
}

// Both in one. Returns nnz; where it is above `most`, y is left alone and the lists are kept for
// this thread's lte_activate.
int64_t lte_ffn(const Layer* l, const void* x, int64_t T, float threshold, int isa, int threads,
                int64_t most, void* y) {
  const Kernels& k = kernels_of(isa);
  Scratch& scratch = scratch_of_thread();
  scratch.lists.resize(size_t(l->n * (T + 1) + 1));
  int32_t* offsets = scratch.lists.data();
  int32_t* tokens = offsets + l->n + 1;
  const Inputs in = inputs_of(k, *l, x, T, true);
  route(k, *l, in, T, threshold, threads, offsets, tokens);
  const int64_t count = offsets[l->n];
  if (count <= most) compute(k, *l, in, T, threads, offsets, tokens, y);
  return count;
}

}  // extern "C"
