// Plain data of lte_ffn.cpp. Layer crosses the C interface: raysys/ops/lte_native.py mirrors it.
#pragma once

namespace lte {

using bf16 = uint16_t;

enum Dtype : int32_t { F32 = 0, BF16 = 1 };
enum Act : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

struct Layer {
  const void* w_in;   // [f, d], or [2 f, d] with the gate's rows first
  const void* w_out;  // [f, d]: row j is what neuron j writes
  const float* bias;  // [f] or [2 f], or null
  const void* wr;     // [n, d]
  const float* br;    // [n] or null
  int64_t d, f, E, n;
  int32_t act, gated, dtype, router_dtype;
};

struct Inputs {
  const void* raw;
  const float* f32;  // the same values; null where nobody needs them
};

struct Kernels {
  void (*experts)(const Layer&, const Inputs&, const int32_t*, const int32_t*, int64_t, int64_t,
                  float*);
  void (*route)(const Layer&, const Inputs&, int64_t, int64_t, int64_t, float, uint8_t*);
  void (*finish)(const Layer&, const float*, float*);
  const float* (*widen)(const void*, int64_t);
  void (*activate)(const Layer&, void*, const void*, int64_t, const int32_t*, const int32_t*,
                   int64_t, int64_t);
  bool direct_bf16;  // bfloat16 weights meet x in bfloat16
};

static inline float widen(float a) { return a; }
static inline float widen(bf16 a) {
  uint32_t bits = uint32_t(a) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
static inline void put(float* to, float a) { *to = a; }
static inline bf16 narrow(float a) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 64);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void put(bf16* to, float a) { *to = narrow(a); }

// Buffers that a thread keeps between calls; nothing is shared, so calls may run side by side.
struct Scratch {
  std::vector<float> slots[4];
  std::vector<float> row;
  std::vector<uint8_t> mask;
  std::vector<int32_t> lists;  // of the latest call that gave none of its own
  std::vector<int32_t> next;
  float* floats(int slot, int64_t count) {
    if (int64_t(slots[slot].size()) < count) slots[slot].resize(size_t(count));
    return slots[slot].data();
  }
};

static Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace lte
