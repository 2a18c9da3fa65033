// Weights packed as panels for product_kernel.h, and for the few rows that would not pay for the
// packing, the product with weights as they are.
#pragma once

#include "../recurrent.h"
#include "vec.h"

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

// One panel of a matrix.
template <typename F>
void pack_panel(const Packing<F>& p, int64_t block, F* out) {
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, n = lanes_left<F>(p.width, unit);
    const F* w = p.w + (v % p.gates * p.width + unit) * p.column_stride;
    F* to = out + v * L;
    if (p.column_stride == 1) {
      for (int64_t k = 0; k < p.K; ++k) store<F>(to + k * V * L, n ? load(w + k * p.k_stride, n) : Vec<F>{});
      continue;
    }
    for (int64_t k = 0; k < p.K; k += L) {
      const int64_t depth = lanes_left<F>(p.K, k);
      Vec<F> tile[L];
      for (int64_t l = 0; l < L; ++l) tile[l] = l < n ? load(w + l * p.column_stride + k, depth) : Vec<F>{};
      transpose<F>(tile);
      for (int64_t j = 0; j < depth; ++j) store<F>(to + (k + j) * V * L, tile[j]);
    }
  }
}

// out[i] = init + a[i] w for n rows, w [gates * width, K] as torch holds it, out [rows][vectors][lanes]
// as a product with a panel gives it.
template <typename F>
void multiply_unpacked(const Packing<F>& p, int64_t block, const F* const* rows, int64_t n, const F* init, F* out) {
  constexpr int64_t L = kLanes<F>;
  const int64_t V = p.gates * p.units;
  for (int64_t v = 0; v < V; ++v) {
    const int64_t unit = (block * p.units + v / p.gates) * L, units = lanes_left<F>(p.width, unit);
    const F* w = p.w + (v % p.gates * p.width + unit) * p.column_stride;
    for (int64_t i = 0; i < n; ++i) {
      Vec<F> sums[L] = {};
      for_lanes<F>(0, p.K, [&](int64_t k, int64_t depth) {
        const Vec<F> a = load(rows[i] + k, depth);
        RNNATTN_UNROLL for (int64_t l = 0; l < L; ++l)
          sums[l] += a * load(w + (l < units ? l : 0) * p.column_stride + k, depth);
      });
      transpose<F>(sums);
      Vec<F> sum = init ? load(init + v * L) : Vec<F>{};
      for (int64_t l = 0; l < L; ++l) sum += sums[l];
      store<F>(out + (i * V + v) * L, sum);
    }
  }
}

}  // namespace
