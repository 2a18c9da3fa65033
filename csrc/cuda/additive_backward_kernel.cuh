// Pooling with additive scores: the gradient before the tanh, given the product W x.
//
// Equations: rnnattn/reference/attention_pool.py. Two phases as in attention_pool_kernel.cuh, over
// tiles of the B * T steps: a warp per step takes its score and dp, then `Columns` of A take du and
// what the steps add to dv and db.
#pragma once

#include "attention_pool_kernel.cuh"

namespace rnnattn::cuda {

// Grid (x: P, y: columns of A).
template <typename Scalar, int N>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
additive_backward_kernel(const AdditiveBackward<Scalar> p) {
  __shared__ float weight[kTile], d_score[kTile];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t rows = p.B * p.T;
  const Columns<N> at(p.A);
  const bool own = at.first < p.A;
  float v[N] = {}, bias[N] = {}, dv[N] = {}, db[N] = {};
  if (own) load(p.v + at.first, v);
  if (own && p.b != nullptr) load(p.b + at.first, bias);

  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile; row0 < rows; row0 += p.P * kTile) {
    for (int i = warp; i < kTile; i += kPoolWarps) {
      const int64_t r = row0 + i;
      float w = 0.0f, ds = 0.0f;
      if (r < rows && (p.keep == nullptr || p.keep[r])) {
        float score = 0.0f;
        for (int64_t a = lane; a < p.A; a += kWarp) {
          const float before = p.product[r * p.A + a] + (p.b == nullptr ? 0.0f : to_float(p.b[a]));
          score += tanhf(before) * to_float(p.v[a]);
        }
        const int64_t b = r / p.T;
        const float direct = p.d_weights == nullptr ? 0.0f : p.d_weights[r];
        const float dp = warp_dot<N>(p.x + r * p.D, p.d_pooled + b * p.D, p.D) + direct;
        w = softmax_weight(warp_sum(score), p.lse[b]);
        ds = w * (dp - p.delta[b]);
      }
      if (lane == 0) {
        weight[i] = w;
        d_score[i] = ds;
        if (r < rows && blockIdx.y == 0) p.p[r] = w;
      }
    }
    __syncthreads();
#pragma unroll 2
    for (int i = at.y; i < kTile && row0 + i < rows; i += at.height) {
      if (!own) continue;
      float du[N] = {};
      if (weight[i] != 0.0f) {  // zero: not kept, not to be read
        float product[N];
        load(p.product + (row0 + i) * p.A + at.first, product);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float u = tanhf(product[j] + bias[j]);
          du[j] = d_score[i] * v[j] * (1.0f - u * u);
          dv[j] += d_score[i] * u;
          db[j] += du[j];
        }
      }
      store(p.du + (row0 + i) * p.A + at.first, du);
    }
    __syncthreads();
  }
  sum_over_height(at, dv);
  if (at.y == 0 && own) store(p.dv + blockIdx.x * p.A + at.first, dv);
  sum_over_height(at, db);
  if (at.y == 0 && own) store(p.db + blockIdx.x * p.A + at.first, db);
}

}  // namespace rnnattn::cuda
