// Weights packed as panels for product_kernel.h, and for the few rows that would not pay for the
// packing, the product with weights as they are.
#pragma once

#include "product_kernel.h"

namespace {

using rnnattn::Packing;

#if defined(__clang__)
template <int D, typename F>
inline void exchange(Vec<F>& a, Vec<F>& b) {
  for (int l = 0; l < kLanes<F>; ++l)
    if (!(l & D)) { const F low = b[l]; b[l] = a[l + D]; a[l + D] = low; }
}
#else
template <int D, typename F>
inline void exchange(Vec<F>& a, Vec<F>& b) {
  using Index = decltype(Vec<F>{} < Vec<F>{});
  Index low, high;
  RNNATTN_UNROLL for (int l = 0; l < kLanes<F>; ++l) {
    low[l] = l & D ? kLanes<F> + l - D : l;
    high[l] = l & D ? kLanes<F> + l : l + D;
  }
  const Vec<F> first = a;
  a = __builtin_shuffle(first, b, low);
  b = __builtin_shuffle(first, b, high);
}
#endif

// The matrix of as many rows as lanes, in place: blocks off the diagonal change places, of ever smaller size.
template <typename F, int D = kLanes<F> / 2>
inline void transpose(Vec<F>* rows) {
  RNNATTN_UNROLL for (int i = 0; i < kLanes<F>; ++i)
    if (!(i & D)) exchange<D, F>(rows[i], rows[i + D]);
  if constexpr (D > 1) transpose<F, D / 2>(rows);
}

template <typename F>
inline int64_t lanes_left(int64_t width, int64_t from) {
  const int64_t left = width - from;
  return left < 0 ? 0 : left < kLanes<F> ? left : kLanes<F>;
}

// depth rows of a panel from k on, v the vector's place in a row of V.
template <typename W, typename F>
inline void store_weights(const Vec<F>* rows, int64_t depth, int64_t k, int64_t v, int64_t V, typename W::Word* panel) {
  constexpr int64_t L = kLanes<F>;
  for (int64_t j = 0; j < depth; j += W::kGroup) {
    auto word = W::word(rows[j], 0);
    if constexpr (W::kGroup > 1)
      for (int64_t n = 1; n < W::kGroup && j + n < depth; ++n) word |= W::word(rows[j + n], n);
    std::memcpy(panel + ((k + j) / W::kGroup * V + v) * L, &word, sizeof word);
  }
}

template <typename W, typename F>
void pack_panel_as(const Packing<F>& p, int64_t block, typename W::Word* panel) {
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  const auto weights = [&](int64_t index, int64_t n) { return load_stored<F>(p.stored, p.w, index, n); };
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, n = lanes_left<F>(p.width, unit);
    const int64_t first = (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t k = 0; k < p.K; k += L) {
      const int64_t depth = lanes_left<F>(p.K, k);
      Vec<F> rows[L];
      if (p.column_stride == 1) {
        for (int64_t j = 0; j < depth; ++j) rows[j] = n ? weights(first + (k + j) * p.k_stride, n) : Vec<F>{};
      } else {
        for (int64_t l = 0; l < L; ++l) rows[l] = l < n ? weights(first + l * p.column_stride + k, depth) : Vec<F>{};
        transpose<F>(rows);
      }
      store_weights<W, F>(rows, depth, k, v, V, panel);
    }
  }
  const int64_t filled = (p.K + W::kGroup - 1) / W::kGroup;
  std::memset(panel + filled * V * L, 0, (words<W>(p.K) - filled) * V * L * sizeof *panel);
}

// One panel of a matrix.
template <typename F>
void pack_panel(const Packing<F>& p, int64_t block, void* panels) {
  const int64_t columns = p.gates * p.units * kLanes<F>;
  const auto pack_as = [&](auto held) {
    using W = decltype(held);
    pack_panel_as<W, F>(p, block, static_cast<typename W::Word*>(panels) + block * words<W>(p.K) * columns);
  };
  if constexpr (sizeof(F) == sizeof(float)) {
    if (p.panel == Panel::kBFloat16) return pack_as(PairsOfBFloat16{});
    if (p.panel == Panel::kInt8) return pack_as(FoursOfInt8{});
  }
  pack_as(Full<F>{});
}

// The sum over k of a[k] w[k], w from an index on, in four parts that do not wait for one another.
template <Stored S, typename F, typename Row>
inline Vec<F> dot(const Row* a, const void* w, int64_t index, int64_t K) {
  constexpr int64_t L = kLanes<F>;
  Vec<F> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * L <= K; k += 4 * L)
    RNNATTN_UNROLL for (int64_t j = 0; j < 4; ++j)
      sums[j] += load_row(a + k + j * L, L) * load_stored<F>(S, w, index + k + j * L, L);
  for_lanes<F>(k, K, [&](int64_t at, int64_t n) { sums[0] += load_row(a + at, n) * load_stored<F>(S, w, index + at, n); });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <Stored S, typename F, typename Row>
void multiply_unpacked_from(const Packing<F>& p, int64_t block, const Row* const* rows, int64_t n, const F* init, F* out) {
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, units = lanes_left<F>(p.width, unit);
    const int64_t first = (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> sums[L] = {};
      for (int64_t l = 0; l < units; ++l) sums[l] = dot<S, F>(rows[i], p.w, first + l * p.column_stride, p.K);
      transpose<F>(sums);
      Vec<F> sum = init ? load(init + v * L) : Vec<F>{};
      for (int64_t l = 0; l < L; ++l) sum += sums[l];
      store<F>(out + (i * V + v) * L, sum);
    }
  }
}

// out[i] = init + a[i] w for n rows, w [gates * width, K] as torch holds it, out [rows][vectors][lanes]
// as a product with a panel gives it. One row of w after the other, as they lie in memory.
template <typename F, typename Row>
void multiply_unpacked(const Packing<F>& p, int64_t block, const Row* const* rows, int64_t n, const F* init, F* out) {
  if constexpr (sizeof(F) == sizeof(float)) {
    if (p.stored == Stored::kBFloat16) return multiply_unpacked_from<Stored::kBFloat16>(p, block, rows, n, init, out);
    if (p.stored == Stored::kHalf) return multiply_unpacked_from<Stored::kHalf>(p, block, rows, n, init, out);
  }
  multiply_unpacked_from<Stored::kFull>(p, block, rows, n, init, out);
}

}  // namespace
