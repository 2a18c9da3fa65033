// CUDA's execution model on one CPU thread, as far as csrc/cuda uses it: blocks run one after
// another, the threads of a block are fibers that switch at barriers and warp exchanges. After
// each switch a random thread goes on, so that results do not hide a missing barrier. Proves
// indexing, arithmetic and barriers; says nothing about speed, memory ordering or the compiler.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define RNNATTN_LIBRARY rnnattn_cuda_emulation
#define RNNATTN_DISPATCH_KEY CPU
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  dim3 thread;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline int current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int64_t progress;  // grows when a barrier opens or a thread ends

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;

  void wait(int count) {
    const int64_t mine = generation;
    if (++arrived == count) {
      arrived = 0;
      ++generation;
      ++progress;
    }
    while (mine == generation) yield();
  }
};

inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<float> exchanged;
inline int any;

inline void sync_block() { block_barrier.wait(static_cast<int>(fibers.size())); }
inline void sync_warp() { warp_barriers[current / kWarp].wait(kWarp); }

inline void run_fiber() {
  body();
  fibers[current].done = true;
  ++progress;
}

inline void run_block() {
  std::vector<int> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int>(i);
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  static std::minstd_rand random(1);
  block_barrier = {};
  warp_barriers.assign((fibers.size() + kWarp - 1) / kWarp, {});
  exchanged.resize(fibers.size());
  while (!order.empty()) {
    const int64_t before = progress;
    std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      current = i;
      threadIdx = fibers[i].thread;
      swapcontext(&scheduler, &fibers[i].context);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](int i) { return fibers[i].done; }), order.end());
    if (progress == before) throw std::runtime_error("a barrier that some threads of the block never reach");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::sync_block(); }

inline int __syncthreads_or(int predicate) {
  emulation::any |= predicate;
  emulation::sync_block();
  const int result = emulation::any;
  emulation::sync_block();
  emulation::any = 0;
  emulation::sync_block();
  return result;
}

inline float __shfl_xor_sync(unsigned, float a, int lane_mask) {
  const int me = emulation::current;
  emulation::exchanged[me] = a;
  emulation::sync_warp();
  const float other = emulation::exchanged[me ^ lane_mask];
  emulation::sync_warp();
  return other;
}

using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;
inline float __half2float(__half a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __half __float2half(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }

// Every lane holds the whole matrix; lane 0 writes it back.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename Element, typename Layout = row_major>
struct fragment {
  float at[16][16];
};

template <typename F>
void fill_fragment(F& fragment, float value) {
  for (auto& row : fragment.at) std::fill(std::begin(row), std::end(row), value);
}

template <typename Use, typename Element, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, Element, Layout>& to, const Element* from, unsigned stride) {
  constexpr bool transposed = std::is_same_v<Layout, col_major>;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to.at[i][j] = transposed ? from[j * stride + i] : from[i * stride + j];
  }
  emulation::sync_warp();
}

template <typename A, typename B, typename C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  C sum = c;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) sum.at[i][j] += a.at[i][k] * b.at[k][j];
    }
  }
  d = sum;
  emulation::sync_warp();
}

template <typename C>
void store_matrix_sync(float* to, const C& from, unsigned stride, layout_t) {
  for (int i = 0; i < 16 && emulation::current % emulation::kWarp == 0; ++i) {
    for (int j = 0; j < 16; ++j) to[i * stride + j] = from.at[i][j];
  }
  emulation::sync_warp();
}

}  // namespace nvcuda::wmma

namespace rnnattn::cuda {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <typename Tensor>
bool on_device(const Tensor& a) {
  return a.is_cpu();
}

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, int, const Params& params) {
  gridDim = grid;
  blockDim = block;
  emulation::body = [&] { kernel(params); };
  emulation::fibers.resize(block.x * block.y * block.z);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) emulation::run_block();
  }
}

}  // namespace rnnattn::cuda
