// Softmax pooling over a sequence, and its backward for linear scores.
//
// Equations: rnnattn/reference/attention_pool.py. A block walks over tiles of kTile steps of a
// row, in two phases: a warp per step takes the dot products over D, then threads laid out as
// `Columns` take the sums over the steps. x comes from device memory in the first phase and from
// the cache in the second. A part's sums are relative to its running maximum (online softmax).
#pragma once

#include "attention_pool.h"
#include "cell_math.cuh"
#include "vector.cuh"

namespace rnnattn::cuda {

constexpr int kPoolThreads = 256;
constexpr int kPoolBlocks = 3;  // on a multiprocessor: leaves 80 registers, enough not to spill
constexpr int kPoolWarps = kPoolThreads / kWarp;
constexpr int kTile = kWarp;  // a lane per step where a warp looks at all scores of a tile

__device__ inline bool kept(const Keep& keep, int64_t b, int64_t t) {
  return (keep.lengths == nullptr || t < keep.lengths[b]) &&
         (keep.mask == nullptr || keep.mask[b * keep.mask_stride + t]);
}

template <typename Scalar>
__device__ inline const Scalar* step(const Sequence<Scalar>& x, int64_t b, int64_t t) {
  return x.data + b * x.stride_b + t * x.stride_t;
}

// Threads as [height, width]: thread (y, x) owns N neighbouring columns and every height-th step.
// gridDim.y blocks side by side cover all columns; width is a power of two.
template <int N>
struct Columns {
  int width, x, y, height;
  int64_t first;

  __device__ explicit Columns(int64_t columns) {
    width = 1;
    while (width < kPoolThreads && static_cast<int64_t>(width) * N < columns) width *= 2;
    x = threadIdx.x % width;
    y = threadIdx.x / width;
    height = kPoolThreads / width;
    first = (static_cast<int64_t>(blockIdx.y) * width + x) * N;
  }
};

// Sums over the threads of a column, in a fixed order; thread y = 0 gets the result.
template <int N>
__device__ inline void sum_over_height(const Columns<N>& at, float (&a)[N]) {
  __shared__ float shared[kPoolThreads][N];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < N; ++j) shared[threadIdx.x][j] = a[j];
  __syncthreads();
  if (at.y != 0) return;
  for (int y = 1; y < at.height; ++y) {
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] += shared[y * at.width + at.x][j];
  }
}

// Grid (x: B * S, y: columns of D).
template <typename Scalar, int N>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks) pool_forward_kernel(const PoolForward<Scalar> p) {
  __shared__ float score[kTile], weight[kTile];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / p.S, part = blockIdx.x % p.S;
  const int64_t tiles = (p.T + kTile - 1) / kTile;
  const int64_t begin = part * tiles / p.S * kTile;
  int64_t end = (part + 1) * tiles / p.S * kTile;
  if (end > p.T) end = p.T;
  const Columns<N> at(p.D);
  const bool own = at.first < p.D;

  float m = -INFINITY, sum = 0.0f, pooled[N] = {};
  for (int64_t t0 = begin; t0 < end; t0 += kTile) {
    for (int i = warp; i < kTile; i += kPoolWarps) {
      const int64_t t = t0 + i;
      float s = -INFINITY;
      if (t < end && kept(p.keep, b, t)) {
        s = p.v == nullptr ? p.scores[b * p.T + t] : warp_dot<N>(step(p.x, b, t), p.v, p.D);
      }
      if (lane == 0) {
        score[i] = s;
        if (t < end && p.v != nullptr && p.scores != nullptr && blockIdx.y == 0) p.scores[b * p.T + t] = s;
      }
    }
    __syncthreads();
    const float s = score[lane], m_new = fmaxf(m, warp_max(s)), w = softmax_weight(s, m_new);
    const float scale = rescale(m, m_new);
    sum = sum * scale + warp_sum(w);
    m = m_new;
    if (warp == 0) weight[lane] = w;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; ++j) pooled[j] *= scale;
#pragma unroll 2
    for (int i = at.y; i < kTile; i += at.height) {
      if (!own || weight[i] == 0.0f) continue;  // zero: not kept, not to be read
      float x[N];
      load(step(p.x, b, t0 + i) + at.first, x);
#pragma unroll
      for (int j = 0; j < N; ++j) pooled[j] += weight[i] * x[j];
    }
  }
  sum_over_height(at, pooled);
  if (at.y == 0 && own) store(p.partial + blockIdx.x * p.D + at.first, pooled);
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    p.partial_m[blockIdx.x] = m;
    p.partial_sum[blockIdx.x] = sum;
  }
}

// Grid (x: B, y: columns of D, one to a thread).
template <typename Scalar>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks) pool_combine_kernel(const PoolCombine<Scalar> p) {
  const int64_t b = blockIdx.x, d = static_cast<int64_t>(blockIdx.y) * kPoolThreads + threadIdx.x;
  float m = -INFINITY, sum = 0.0f, pooled = 0.0f;
  for (int64_t s = b * p.S; s < (b + 1) * p.S; ++s) {
    const float m_new = fmaxf(m, p.partial_m[s]);
    const float scale = rescale(m, m_new), part = rescale(p.partial_m[s], m_new);
    sum = sum * scale + p.partial_sum[s] * part;
    if (d < p.D) pooled = pooled * scale + p.partial[s * p.D + d] * part;
    m = m_new;
  }
  const float lse = sum == 0.0f ? -INFINITY : m + logf(sum);
  if (d < p.D) p.pooled[b * p.D + d] = sum == 0.0f ? 0.0f : pooled / sum;
  if (blockIdx.y != 0) return;
  if (threadIdx.x == 0) p.lse[b] = lse;
  if (p.weights == nullptr) return;
  for (int64_t t = threadIdx.x; t < p.T; t += kPoolThreads) {
    from_float(softmax_weight(p.scores[b * p.T + t], lse), p.weights[b * p.T + t]);
  }
}

// Grid (x: P, y: columns of D).
template <typename Scalar, int N>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks)
linear_pool_backward_kernel(const LinearPoolBackward<Scalar> p) {
  __shared__ float weight[kTile], d_score[kTile];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = (p.T + kTile - 1) / kTile;
  const Columns<N> at(p.D);
  const bool own = at.first < p.D;
  float v[N] = {}, dv[N] = {};
  if (own) load(p.v + at.first, v);

  for (int64_t tile = blockIdx.x; tile < p.B * tiles; tile += p.P) {
    const int64_t b = tile / tiles, t0 = tile % tiles * kTile;
    const float* d_pooled = p.d_pooled + b * p.D;
    for (int i = warp; i < kTile; i += kPoolWarps) {
      const int64_t t = t0 + i;
      float w = 0.0f, ds = 0.0f;
      if (t < p.T && kept(p.keep, b, t)) {
        const Scalar* x = step(p.x, b, t);
        w = softmax_weight(warp_dot<N>(x, p.v, p.D), p.lse[b]);
        const float direct = p.d_weights == nullptr ? 0.0f : p.d_weights[b * p.T + t];
        ds = w * (warp_dot<N>(x, d_pooled, p.D) + direct - p.delta[b]);
      }
      if (lane == 0) {
        weight[i] = w;
        d_score[i] = ds;
      }
    }
    __syncthreads();
    float g[N] = {};
    if (own) load(d_pooled + at.first, g);
#pragma unroll 2
    for (int i = at.y; i < kTile && t0 + i < p.T; i += at.height) {
      if (!own) continue;
      float dx[N] = {};
      if (weight[i] != 0.0f) {
        float x[N];
        load(step(p.x, b, t0 + i) + at.first, x);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          dx[j] = weight[i] * g[j] + d_score[i] * v[j];
          dv[j] += d_score[i] * x[j];
        }
      }
      store(p.dx + (b * p.T + t0 + i) * p.D + at.first, dx);
    }
    __syncthreads();
  }
  sum_over_height(at, dv);
  if (at.y == 0 && own) store(p.dv + blockIdx.x * p.D + at.first, dv);
}

}  // namespace rnnattn::cuda
