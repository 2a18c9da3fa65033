// The product of a few rows with a matrix that stays in cache: what a scan of a small batch multiplies
// at every step, where a GEMM library's own cost would exceed the work.
#pragma once

#include "../lstm.h"
#include "vec.h"

namespace {

// Rows [0, R), columns [j, j + C vectors).
template <int R, int C, typename F>
inline void product_block(const rnnattn::RowsProduct<F>& p, const F* a, F* out, int64_t j) {
  Vec<F> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = p.add ? load(out + r * p.out_stride + j + c * kLanes<F>) : Vec<F>{};
  for (int64_t k = 0; k < p.K; ++k)
    for (int c = 0; c < C; ++c) {
      const Vec<F> w = load(p.w + k * p.N + j + c * kLanes<F>);
      for (int r = 0; r < R; ++r) sum[r][c] += a[r * p.a_stride + k] * w;
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store<F>(out + r * p.out_stride + j + c * kLanes<F>, sum[r][c]);
}

template <int R, typename F>
inline void product_rows(const rnnattn::RowsProduct<F>& p, int64_t row) {
  constexpr int C = R == 1 ? 8 : 4;  // enough independent sums to hide the latency of the multiply-add
  const F* a = p.a + row * p.a_stride;
  F* out = p.out + row * p.out_stride;
  int64_t j = 0;
  for (; j + C * kLanes<F> <= p.N; j += C * kLanes<F>) product_block<R, C>(p, a, out, j);
  for (; j + kLanes<F> <= p.N; j += kLanes<F>) product_block<R, 1>(p, a, out, j);
  for (; j < p.N; ++j)
    for (int r = 0; r < R; ++r) {
      F sum = p.add ? out[r * p.out_stride + j] : F(0);
      for (int64_t k = 0; k < p.K; ++k) sum += a[r * p.a_stride + k] * p.w[k * p.N + j];
      out[r * p.out_stride + j] = sum;
    }
}

template <typename F>
void rows_product(const rnnattn::RowsProduct<F>& p) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) product_rows<4>(p, row);
  for (; row < p.rows; ++row) product_rows<1>(p, row);
}

}  // namespace
