// The arithmetic of LTE's FFN for one instruction set; included by lte_ffn.cpp after lte_vector.h,
// inside the same namespace. Weights are rows of neurons: input rows [f, d], output rows [f, d].

constexpr int TILE = 4;    // tokens that share one pass over an expert's weights
constexpr int GROUP = 32;  // tokens that share one reading of them from beyond the cache
constexpr int WIDE = LANES == 16 ? 4 : 3;  // rows x 4 tokens that fit into 32 or 16 registers

// How x and a weight row meet: W is the weight's type, X the type of x it is multiplied with.
template <class W, class X>
struct Meet {
  using Weight = W;
  using Input = X;
  static constexpr int STEP = LANES;
  static inline V step(V acc, const W* w, const X* x) { return fma(load(w), load(x), acc); }
};
#if defined(LTE_DOT_BF16)
template <>
struct Meet<bf16, bf16> {
  using Weight = bf16;
  using Input = bf16;
  static constexpr int STEP = 32;
  static inline V step(V acc, const bf16* w, const bf16* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
  }
};
using InputOfBf16 = bf16;
#else
using InputOfBf16 = float;  // x is widened once, weights on the fly
#endif

// out[t * stride + r] = w[r] . x[t] for R rows d apart and N tokens.
template <class M, int R, int N>
static inline void block(const typename M::Weight* w, const typename M::Input* const* x, int64_t d,
                         float* out, int stride) {
  V acc[R * N];
  for (int i = 0; i < R * N; ++i) acc[i] = zero();
  int64_t k = 0;
  for (; k + M::STEP <= d; k += M::STEP)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < N; ++t)
        acc[r * N + t] = M::step(acc[r * N + t], w + r * d + k, x[t] + k);
  float sums[R * N];
  int i = 0;
  for (; i + 8 <= R * N; i += 8) sum8(acc + i, sums + i);
  for (; i + 4 <= R * N; i += 4) sum4(acc + i, sums + i);
  for (; i < R * N; ++i) sums[i] = sum(acc[i]);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) {
      float s = sums[r * N + t];
      for (int64_t i = k; i < d; ++i) s += widen(w[r * d + i]) * widen(x[t][i]);
      out[t * stride + r] = s;
    }
}

template <class M, int N>
static void dots_n(const typename M::Weight* w, int64_t rows, const typename M::Input* const* x,
                   int64_t d, float* out, int stride) {
  constexpr int R = N == 1 ? 8 : (N == 4 ? 2 : 4);
  int64_t r = 0;
  if constexpr (N == 4)
    for (; r + WIDE <= rows; r += WIDE) block<M, WIDE, N>(w + r * d, x, d, out + r, stride);
  for (; r + R <= rows; r += R) block<M, R, N>(w + r * d, x, d, out + r, stride);
  for (; r < rows; ++r) block<M, 1, N>(w + r * d, x, d, out + r, stride);
}

// out[t, r] = w[r] . x[t] for `rows` rows and 1 to TILE tokens.
template <class M>
static inline void dots(const typename M::Weight* w, int64_t rows,
                        const typename M::Input* const* x, int tokens, int64_t d, float* out,
                        int stride) {
  switch (tokens) {
    case 1: return dots_n<M, 1>(w, rows, x, d, out, stride);
    case 2: return dots_n<M, 2>(w, rows, x, d, out, stride);
    case 3: return dots_n<M, 3>(w, rows, x, d, out, stride);
    default: return dots_n<M, 4>(w, rows, x, d, out, stride);
  }
}

static inline float activate_one(float z, int kind) {
  switch (kind) {
    case SILU: return z / (1.0f + std::exp(-z));
    case GELU: return 0.5f * z * (1.0f + std::erf(z * 0.70710678f));
    case GELU_TANH: return 0.5f * z * (1.0f + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));
    default: return z > 0.0f ? z : 0.0f;
  }
}

// g[i] = act(g[i]) (* u[i])
static inline void activate(float* g, const float* u, int64_t count, int kind) {
  int64_t i = 0;
  if (kind == SILU)
    for (; i + LANES <= count; i += LANES) {
      V z = load(g + i);
      V s = div(z, add(splat(1.0f), exp_of(mul(z, splat(-1.0f)))));
      store(g + i, u ? mul(s, load(u + i)) : s);
    }
  for (; i < count; ++i) {
    float s = activate_one(g[i], kind);
    g[i] = u ? s * u[i] : s;
  }
}

// y[t, :] += sum_j a[t, j] * w[j, :]; the plain order of columns.
template <class W>
struct Down {
  static constexpr int R = 8;
  static void add_rows(const W* w, int64_t rows, int64_t d, const float* a, int stride,
                       float* const* y, int tokens) {
    constexpr int MANY = LANES == 16 ? 6 : 3;  // vectors x 4 tokens that fit into the registers
    switch (tokens) {
      case 1: return one(w, rows, d, a, y[0]);
      case 2: return columns<2, MANY + 1>(w, rows, d, a, stride, y);
      case 3: return columns<3, MANY>(w, rows, d, a, stride, y);
      default: return columns<4, MANY>(w, rows, d, a, stride, y);
    }
  }
  static void finish(const float* y, int64_t d, float* out) { std::memcpy(out, y, d * sizeof(float)); }

 private:
  // Several tokens: y stays in registers while all rows pass, a few columns at a time.
  template <int N, int C>
  static void columns(const W* w, int64_t rows, int64_t d, const float* a, int stride,
                      float* const* y) {
    int64_t k = 0;
    for (; k + C * LANES <= d; k += C * LANES) strip<N, C>(w + k, rows, d, a, stride, y, k);
    for (; k + LANES <= d; k += LANES) strip<N, 1>(w + k, rows, d, a, stride, y, k);
    for (; k < d; ++k)
      for (int t = 0; t < N; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t][k] += a[t * stride + r] * widen(w[r * d + k]);
  }
  template <int N, int C>
  static inline void strip(const W* w, int64_t rows, int64_t d, const float* a, int stride,
                           float* const* y, int64_t k) {
    V acc[N][C];
    for (int t = 0; t < N; ++t)
      for (int c = 0; c < C; ++c) acc[t][c] = load(y[t] + k + c * LANES);
    for (int64_t r = 0; r < rows; ++r, w += d) {
      V row[C];
      for (int c = 0; c < C; ++c) row[c] = load(w + c * LANES);
      for (int t = 0; t < N; ++t) {
        const V by = splat(a[t * stride + r]);
        for (int c = 0; c < C; ++c) acc[t][c] = fma(by, row[c], acc[t][c]);
      }
    }
    for (int t = 0; t < N; ++t)
      for (int c = 0; c < C; ++c) store(y[t] + k + c * LANES, acc[t][c]);
  }
  // One token: the weights come from memory and are read in their order, R rows side by side.
  static void one(const W* w, int64_t rows, int64_t d, const float* a, float* y) {
    int64_t r = 0;
    for (; r + R <= rows; r += R) tile<R>(w + r * d, d, a + r, y);
    for (; r < rows; ++r) tile<1>(w + r * d, d, a + r, y);
  }
  template <int N>
  static inline void tile(const W* w, int64_t d, const float* a, float* y) {
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) {
      V acc = load(y + k);
      for (int r = 0; r < N; ++r) acc = fma(splat(a[r]), load(w + r * d + k), acc);
      store(y + k, acc);
    }
    for (; k < d; ++k)
      for (int r = 0; r < N; ++r) y[k] += a[r] * widen(w[r * d + k]);
  }
};

#if defined(LTE_DOT_BF16)
// Rows in pairs: interleaving two rows and one vdpbf16ps do the work of two widenings and two FMAs.
// The interleaved order of columns is kept in y until finish() restores it. Activations are rounded
// to bfloat16, as a dense bfloat16 layer rounds them.
template <>
struct Down<bf16> {
  static void add_rows(const bf16* w, int64_t rows, int64_t d, const float* a, int stride,
                       float* const* y, int tokens) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) tile<4>(w + r * d, d, a + r, stride, y, tokens);
    for (; r + 2 <= rows; r += 2) tile<1>(w + r * d, d, a + r, stride, y, tokens);
    if (r < rows) single(w + r * d, d, a + r, stride, y, tokens);
  }
  static void finish(const float* y, int64_t d, float* out) {
    int64_t k = 0;
    for (; k + 32 <= d; k += 32)
      for (int lane = 0; lane < 4; ++lane) {
        std::memcpy(out + k + 8 * lane, y + k + 4 * lane, 16);
        std::memcpy(out + k + 8 * lane + 4, y + k + 16 + 4 * lane, 16);
      }
    for (; k < d; ++k) out[k] = y[k];
  }

 private:
  static inline __m512bh pair(float a, float b) {
    uint32_t both = uint32_t(narrow(a)) | (uint32_t(narrow(b)) << 16);
    return (__m512bh)_mm512_set1_epi32(int(both));
  }
  template <int P>  // pairs of rows
  static inline void tile(const bf16* w, int64_t d, const float* a, int stride, float* const* y,
                          int tokens) {
    __m512bh act[TILE][P];
    for (int t = 0; t < tokens; ++t)
      for (int p = 0; p < P; ++p) act[t][p] = pair(a[t * stride + 2 * p], a[t * stride + 2 * p + 1]);
    int64_t k = 0;
    for (; k + 32 <= d; k += 32) {
      __m512bh low[P], high[P];
      for (int p = 0; p < P; ++p) {
        __m512i one = _mm512_loadu_si512(w + 2 * p * d + k);
        __m512i two = _mm512_loadu_si512(w + (2 * p + 1) * d + k);
        low[p] = (__m512bh)_mm512_unpacklo_epi16(one, two);
        high[p] = (__m512bh)_mm512_unpackhi_epi16(one, two);
      }
      for (int t = 0; t < tokens; ++t) {
        V first = load(y[t] + k), second = load(y[t] + k + 16);
        for (int p = 0; p < P; ++p) {
          first = _mm512_dpbf16_ps(first, low[p], act[t][p]);
          second = _mm512_dpbf16_ps(second, high[p], act[t][p]);
        }
        store(y[t] + k, first);
        store(y[t] + k + 16, second);
      }
    }
    for (; k < d; ++k)
      for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < 2 * P; ++r) y[t][k] += a[t * stride + r] * widen(w[r * d + k]);
  }
  static void single(const bf16* w, int64_t d, const float* a, int stride, float* const* y,
                     int tokens) {
    for (int64_t k = 0; k < d; ++k) {
      int64_t base = k / 32 * 32, j = k - base;
      bool whole = base + 32 <= d;
      int64_t at = whole ? base + (j / 8) * 4 + (j % 4) + (j % 8 >= 4 ? 16 : 0) : k;
      for (int t = 0; t < tokens; ++t) y[t][at] += a[t * stride] * widen(w[k]);
    }
  }
};
#endif

// Asks for a matrix that is read soon, a share at a time while tiles of another one are computed.
// With one or two tiles the time is that of the memory, and the processor reads ahead by itself.
struct Ahead {
  const char* at;
  int64_t bytes;
  void share(int tile, int tiles) const {
    if (!at || tiles < 3) return;
    const int64_t end = bytes * (tile + 1) / tiles;
    for (int64_t b = bytes * tile / tiles; b < end; b += 64) __builtin_prefetch(at + b, 0, 2);
  }
};

// Up to GROUP tokens of one expert: one matrix after the other, so that each is read once from afar.
template <class W, class X>
static void expert(const Layer& l, int64_t e, bool more, const X* const* xs, float* const* ys, int n,
                   float* g, float* u) {
  const int64_t d = l.d, E = l.E, bytes = E * d * int64_t(sizeof(W));
  const W* gate = static_cast<const W*>(l.w_in) + e * E * d;
  const W* up = gate + l.f * d;
  const W* down = static_cast<const W*>(l.w_out) + e * E * d;
  const int tiles = (n + TILE - 1) / TILE, stride = int(E);
  auto each = [&](const void* next, auto run) {
    const Ahead ahead{static_cast<const char*>(next), bytes};
    for (int i = 0; i < tiles; ++i) {
      run(i * TILE, std::min(TILE, n - i * TILE));
      ahead.share(i, tiles);
    }
  };
  each(l.gated ? up : down, [&](int t, int m) {
    dots<Meet<W, X>>(gate, E, xs + t, m, d, g + t * E, stride);
  });
  if (l.gated)
    each(down, [&](int t, int m) { dots<Meet<W, X>>(up, E, xs + t, m, d, u + t * E, stride); });
  if (l.bias)
    for (int t = 0; t < n; ++t)
      for (int64_t j = 0; j < E; ++j) {
        g[t * E + j] += l.bias[e * E + j];
        if (l.gated) u[t * E + j] += l.bias[l.f + e * E + j];
      }
  activate(g, l.gated ? u : nullptr, n * E, l.act);
  each(more ? gate + E * d : nullptr, [&](int t, int m) {
    Down<W>::add_rows(down, E, d, g + t * E, stride, ys + t, m);
  });
}

// Experts [first, last) of one layer: adds into y, float32 [T, d] in Down's order of columns.
template <class W, class X>
static void experts(const Layer& l, const X* x, const int32_t* offsets, const int32_t* tokens,
                    int64_t first, int64_t last, float* y) {
  Scratch& scratch = scratch_of_thread();
  float* g = scratch.floats(0, GROUP * l.E);
  float* u = scratch.floats(1, GROUP * l.E);
  const X* xs[GROUP];
  float* ys[GROUP];
  for (int64_t e = first; e < last; ++e)
    for (int32_t i = offsets[e]; i < offsets[e + 1]; i += GROUP) {
      const int n = std::min<int>(GROUP, offsets[e + 1] - i);
      for (int t = 0; t < n; ++t) {
        xs[t] = x + tokens[i + t] * l.d;
        ys[t] = y + tokens[i + t] * l.d;
      }
      const bool more = e + 1 < last && offsets[e + 1] < offsets[e + 2];
      expert<W, X>(l, e, more, xs, ys, n, g, u);
    }
}

// mask[e * T + t] = x[t] . wr[e] + br[e] > threshold, for experts [first, last).
template <class W, class X>
static void route_rows(const Layer& l, const X* x, int64_t T, int64_t first, int64_t last,
                       float threshold, uint8_t* mask) {
  const W* wr = static_cast<const W*>(l.wr);
  float* z = scratch_of_thread().floats(0, TILE * l.n);
  const int64_t rows = last - first;
  for (int64_t t0 = 0; t0 < T; t0 += TILE) {
    const int n = int(std::min<int64_t>(TILE, T - t0));
    const X* xs[TILE];
    for (int t = 0; t < n; ++t) xs[t] = x + (t0 + t) * l.d;
    dots<Meet<W, X>>(wr + first * l.d, rows, xs, n, l.d, z, int(rows));
    for (int t = 0; t < n; ++t)
      for (int64_t r = 0; r < rows; ++r) {
        float logit = z[t * rows + r] + (l.br ? l.br[first + r] : 0.0f);
        mask[(first + r) * T + t0 + t] = logit > threshold;
      }
  }
}

// g[:] = act(row + bias) (* (up + bias)) of one token and one expert; up, u and bias may be null.
template <class W>
static inline void activate_into(const Layer& l, const W* row, const W* up, const float* bias,
                                 float* g, float* u) {
  const int64_t E = l.E;
  for (int64_t j = 0; j < E; ++j) g[j] = widen(row[j]) + (bias ? bias[j] : 0.0f);
  if (up)
    for (int64_t j = 0; j < E; ++j) u[j] = widen(up[j]) + (bias ? bias[l.f + j] : 0.0f);
  activate(g, up ? u : nullptr, E, l.act);
}

// z[t, :] = act(z) (* up) where an expert of [first, last) is on, else 0; z and up are [T, f].
template <class W>
static void activate_rows(const Layer& l, W* z, const W* up, int64_t T, const int32_t* offsets,
                          const int32_t* tokens, int64_t first, int64_t last) {
  const int64_t E = l.E;
  Scratch& scratch = scratch_of_thread();
  float* g = scratch.floats(0, E);
  float* u = scratch.floats(1, E);
  std::vector<int32_t>& next = scratch.next;  // place in each expert's list of tokens
  next.assign(offsets + first, offsets + last);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = first; e < last; ++e) {
      W* row = z + t * l.f + e * E;
      const W* over = up ? up + t * l.f + e * E : nullptr;
      int32_t& i = next[size_t(e - first)];
      if (i == offsets[e + 1] || tokens[i] != t) {
        std::memset(row, 0, size_t(E) * sizeof(W));
        continue;
      }
      ++i;
      if constexpr (std::is_same<W, float>::value)
        if (!l.bias) {
          activate(row, over, E, l.act);
          continue;
        }
      activate_into(l, row, over, l.bias ? l.bias + e * E : nullptr, g, u);
      for (int64_t j = 0; j < E; ++j) put(row + j, g[j]);
    }
}

static const float* widened(const void* x, int64_t count) {
  const bf16* from = static_cast<const bf16*>(x);
  float* to = scratch_of_thread().floats(2, count);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
  return to;
}

static const Kernels KERNELS = {
    // expert computation: float32, bfloat16
    [](const Layer& l, const Inputs& x, const int32_t* o, const int32_t* t, int64_t a, int64_t b,
       float* y) {
      if (l.dtype == F32) return experts<float, float>(l, x.f32, o, t, a, b, y);
      if constexpr (std::is_same<InputOfBf16, bf16>::value)
        return experts<bf16, InputOfBf16>(l, (const InputOfBf16*)x.raw, o, t, a, b, y);
      else
        return experts<bf16, InputOfBf16>(l, (const InputOfBf16*)x.f32, o, t, a, b, y);
    },
    [](const Layer& l, const Inputs& x, int64_t T, int64_t a, int64_t b, float threshold,
       uint8_t* mask) {
      if (l.router_dtype == F32) return route_rows<float, float>(l, x.f32, T, a, b, threshold, mask);
      if (std::is_same<InputOfBf16, bf16>::value && l.dtype == BF16)
        return route_rows<bf16, InputOfBf16>(l, (const InputOfBf16*)x.raw, T, a, b, threshold, mask);
      return route_rows<bf16, float>(l, x.f32, T, a, b, threshold, mask);
    },
    [](const Layer& l, const float* y, float* out) {
      if (l.dtype == F32) return Down<float>::finish(y, l.d, out);
      return Down<bf16>::finish(y, l.d, out);
    },
    widened,
    [](const Layer& l, void* z, const void* up, int64_t T, const int32_t* o, const int32_t* t,
       int64_t a, int64_t b) {
      if (l.dtype == F32) return activate_rows(l, (float*)z, (const float*)up, T, o, t, a, b);
      return activate_rows(l, (bf16*)z, (const bf16*)up, T, o, t, a, b);
    },
    std::is_same<InputOfBf16, bf16>::value,
};
