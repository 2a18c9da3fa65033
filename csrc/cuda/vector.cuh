// Vectors of N elements between memory and fp32 registers, and sums over a warp or a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rnnattn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(__half a) { return __half2float(a); }
__device__ inline float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }

__device__ inline void from_float(float a, float& out) { out = a; }
__device__ inline void from_float(float a, __half& out) { out = __float2half(a); }
__device__ inline void from_float(float a, __nv_bfloat16& out) { out = __float2bfloat16(a); }

// N elements that move in one access; the address must be a multiple of their size.
template <typename Scalar, int N>
struct alignas(sizeof(Scalar) * N) Pack {
  Scalar element[N];
};

template <int N, typename Scalar>
__device__ inline void load(const Scalar* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<Scalar, N>*>(from);
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = to_float(pack.element[j]);
}

template <int N, typename Scalar>
__device__ inline void store(Scalar* to, const float (&from)[N]) {
  Pack<Scalar, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) from_float(from[j], pack.element[j]);
  *reinterpret_cast<Pack<Scalar, N>*>(to) = pack;
}

// Every lane of the warp takes part and gets the result.
__device__ inline float warp_sum(float a) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) a += __shfl_xor_sync(kAllLanes, a, offset);
  return a;
}

__device__ inline float warp_max(float a) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) a = fmaxf(a, __shfl_xor_sync(kAllLanes, a, offset));
  return a;
}

// Every thread of the block, which is whole warps side by side, takes part and gets the results.
template <int N>
__device__ inline void block_sum(float (&a)[N]) {
  __shared__ float parts[kWarp][N];
#pragma unroll
  for (int j = 0; j < N; ++j) a[j] = warp_sum(a[j]);
  __syncthreads();  // all have read the results of the sum before
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp][j] = a[j];
    a[j] = 0.0f;
  }
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
#pragma unroll
    for (int j = 0; j < N; ++j) a[j] += parts[warp][j];
  }
}

// a . b over D elements (a multiple of N) by one warp.
template <int N, typename A, typename B>
__device__ inline float warp_dot(const A* a, const B* b, int64_t D) {
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t d = (threadIdx.x % kWarp) * N; d < D; d += kWarp * N) {
    float x[N], y[N];
    load(a + d, x);
    load(b + d, y);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += x[j] * y[j];
  }
  return warp_sum(sum);
}

}  // namespace rnnattn::cuda
