// Additive scores v . tanh(W x_t + b).
//
// Equations: rnnattn/reference/attention_pool.py. The product W x is taken in tiles of kTileRows
// steps by kTileColumns of A through shared memory; the tanh and the sum over A follow on the
// tile, so that [B, T, A] never reaches device memory. 16-bit products run on tensor cores, fp32
// ones in true fp32.
#pragma once

#include <mma.h>

#include <type_traits>

#include "attention_pool_kernel.cuh"

namespace rnnattn::cuda {

constexpr int kTileRows = 64, kTileColumns = 64, kTileDepth = 32;
constexpr int kTileThreads = 128, kTileWarps = kTileThreads / kWarp;

// a [rows, depth] and b [columns, depth] of a product a b^T, and its result c [rows, columns].
// Rows are padded against bank conflicts; the tensor cores want 16-byte steps from row to row.
template <typename Scalar>
struct Tiles {
  static constexpr int kStride = kTileDepth + (sizeof(Scalar) == 2 ? 8 : 1);
  alignas(32) Scalar a[kTileRows][kStride];
  alignas(32) Scalar b[kTileColumns][kStride];
  alignas(32) float c[kTileRows][kTileColumns + 4];
};

// Sums of products in plain fp32; a thread owns rows y, y + 8, ... and columns x, x + 16, ...
template <typename Scalar>
struct FmaProduct {
  static constexpr int kX = 16, kY = kTileThreads / kX;
  float sum[kTileRows / kY][kTileColumns / kX] = {};

  __device__ void accumulate(const Tiles<Scalar>& tiles) {
    const int x = threadIdx.x % kX, y = threadIdx.x / kX;
    for (int k = 0; k < kTileDepth; ++k) {
      float b[kTileColumns / kX];
#pragma unroll
      for (int j = 0; j < kTileColumns / kX; ++j) b[j] = to_float(tiles.b[x + kX * j][k]);
#pragma unroll
      for (int i = 0; i < kTileRows / kY; ++i) {
        const float a = to_float(tiles.a[y + kY * i][k]);
#pragma unroll
        for (int j = 0; j < kTileColumns / kX; ++j) sum[i][j] += a * b[j];
      }
    }
  }

  __device__ void store(Tiles<Scalar>& tiles) const {
    const int x = threadIdx.x % kX, y = threadIdx.x / kX;
#pragma unroll
    for (int i = 0; i < kTileRows / kY; ++i) {
#pragma unroll
      for (int j = 0; j < kTileColumns / kX; ++j) tiles.c[y + kY * i][x + kX * j] = sum[i][j];
    }
  }
};

// The same on tensor cores; a warp owns a quarter of the tile, 32 by 32.
template <typename Scalar>
struct MmaProduct {
  template <typename Use, typename Element, typename... Layout>
  using Fragment = nvcuda::wmma::fragment<Use, 16, 16, 16, Element, Layout...>;
  Fragment<nvcuda::wmma::accumulator, float> sum[2][2];

  __device__ MmaProduct() {
    for (auto& row : sum) {
      for (auto& fragment : row) nvcuda::wmma::fill_fragment(fragment, 0.0f);
    }
  }

  __device__ void accumulate(const Tiles<Scalar>& tiles) {
    const int warp = threadIdx.x / kWarp, row = warp / 2 * 32, column = warp % 2 * 32;
    Fragment<nvcuda::wmma::matrix_a, Scalar, nvcuda::wmma::row_major> a[2];
    Fragment<nvcuda::wmma::matrix_b, Scalar, nvcuda::wmma::col_major> b[2];
#pragma unroll
    for (int k = 0; k < kTileDepth; k += 16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        nvcuda::wmma::load_matrix_sync(a[i], &tiles.a[row + 16 * i][k], Tiles<Scalar>::kStride);
        nvcuda::wmma::load_matrix_sync(b[i], &tiles.b[column + 16 * i][k], Tiles<Scalar>::kStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) nvcuda::wmma::mma_sync(sum[i][j], a[i], b[j], sum[i][j]);
      }
    }
  }

  __device__ void store(Tiles<Scalar>& tiles) const {
    const int warp = threadIdx.x / kWarp, row = warp / 2 * 32, column = warp % 2 * 32;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        nvcuda::wmma::store_matrix_sync(&tiles.c[row + 16 * i][column + 16 * j], sum[i][j], kTileColumns + 4,
                                        nvcuda::wmma::mem_row_major);
      }
    }
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // no bf16 on these tensor cores
template <typename Scalar>
using Product = FmaProduct<Scalar>;
#else
template <typename Scalar>
using Product = std::conditional_t<sizeof(Scalar) == 2, MmaProduct<Scalar>, FmaProduct<Scalar>>;
#endif

// Fills a tile with columns [k0, k0 + kTileDepth) of `rows`; zero where a row is null or has ended.
template <int N, typename Scalar, int kRows, int kStride, typename Row>
__device__ inline void load_tile(Scalar (&tile)[kRows][kStride], Row row, int64_t k0, int64_t D) {
  constexpr int kVectors = kTileDepth / N;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kTileThreads) {
    const Scalar* from = row(i / kVectors);
    const int64_t k = k0 + i % kVectors * N;
    Pack<Scalar, N> pack = {};
    if (from != nullptr && k < D) pack = *reinterpret_cast<const Pack<Scalar, N>*>(from + k);
    Scalar* to = &tile[i / kVectors][i % kVectors * N];
    if constexpr (kStride * sizeof(Scalar) % sizeof(pack) == 0) {
      *reinterpret_cast<Pack<Scalar, N>*>(to) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = pack.element[j];
    }
  }
}

// Grid (x: tiles of the B * T steps).
template <typename Scalar, int N>
__global__ void __launch_bounds__(kTileThreads) additive_scores_kernel(const AdditiveScores<Scalar> p) {
  __shared__ Tiles<Scalar> tiles;
  __shared__ const Scalar* x[kTileRows];  // null where not kept
  __shared__ float score[kTileRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows, rows = p.B * p.T;
  bool keeps = false;
  if (threadIdx.x < kTileRows) {
    const int64_t r = row0 + threadIdx.x;
    keeps = r < rows && kept(p.keep, r / p.T, r % p.T);
    x[threadIdx.x] = keeps ? step(p.x, r / p.T, r % p.T) : nullptr;
    score[threadIdx.x] = keeps ? 0.0f : -INFINITY;
  }
  if (__syncthreads_or(keeps)) {
    for (int64_t a0 = 0; a0 < p.A; a0 += kTileColumns) {
      Product<Scalar> product;
      for (int64_t k0 = 0; k0 < p.D; k0 += kTileDepth) {
        load_tile<N>(tiles.a, [&](int i) { return x[i]; }, k0, p.D);
        load_tile<N>(tiles.b, [&](int i) { return a0 + i < p.A ? p.w + (a0 + i) * p.D : nullptr; }, k0, p.D);
        __syncthreads();
        product.accumulate(tiles);
        __syncthreads();
      }
      product.store(tiles);
      __syncthreads();
      for (int i = warp; i < kTileRows; i += kTileWarps) {
        if (x[i] == nullptr) continue;
        float sum = 0.0f;
        for (int j = lane; j < kTileColumns && a0 + j < p.A; j += kWarp) {
          const float u = tanhf(tiles.c[i][j] + (p.b == nullptr ? 0.0f : to_float(p.b[a0 + j])));
          sum += u * to_float(p.v[a0 + j]);
        }
        sum = warp_sum(sum);
        if (lane == 0) score[i] += sum;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < kTileRows && row0 + threadIdx.x < rows) p.scores[row0 + threadIdx.x] = score[threadIdx.x];
}

}  // namespace rnnattn::cuda
