// The pointwise part of one step of a recurrent cell. A thread owns N neighbouring hidden units of one row.
//
// Equations: rnnattn/reference/cells.py. Block (x: units / N, y: rows), grid (x: rows, y: units):
// the row index takes the grid's wide dimension.
#pragma once

#include "cell_math.cuh"
#include "recurrent_step.h"
#include "vector.cuh"

namespace rnnattn::cuda {

// A thread's units of row b.
template <int N>
struct Units {
  int64_t b, j;

  template <typename T>
  __device__ void get(const Rows<T>& a, float (&to)[N], int64_t column = 0) const {
    load(a.data + b * a.stride + column + j, to);
  }

  template <typename T>
  __device__ void put(const Rows<T>& a, const float (&from)[N], int64_t column = 0) const {
    store(a.data + b * a.stride + column + j, from);
  }

  // Zeros for a matrix that there is not.
  template <typename T>
  __device__ void get_if_there(const Rows<T>& a, float (&to)[N], int64_t column = 0) const {
    if (a.data != nullptr) {
      get(a, to, column);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) to[n] = 0.0f;
    }
  }

  // The first G blocks of H columns, by unit.
  template <int G, typename T>
  __device__ void get_gates(const Rows<T>& a, int64_t H, Gates (&to)[N]) const {
#pragma unroll
    for (int k = 0; k < G; ++k) {
      float gate[N];
      get_if_there(a, gate, k * H);
#pragma unroll
      for (int n = 0; n < N; ++n) to[n].at[k] = gate[n];
    }
  }

  template <int G, typename T>
  __device__ void put_gates(const Rows<T>& a, int64_t H, const Gates (&from)[N]) const {
#pragma unroll
    for (int k = 0; k < G; ++k) {
      float gate[N];
#pragma unroll
      for (int n = 0; n < N; ++n) gate[n] = from[n].at[k];
      put(a, gate, k * H);
    }
  }
};

template <int N>
__device__ inline Units<N> units_of_thread() {
  return {static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y,
          (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N};
}

template <typename Cell, typename Scalar, int N>
__global__ void step_forward_kernel(const StepForward<Scalar> p) {
  const Units<N> units = units_of_thread<N>();
  const int64_t b = units.b;
  if (b >= p.B || units.j >= p.H) return;

  float h[N] = {}, c[N] = {}, start_h[N] = {}, start_c[N] = {};
  Gates saved[N];
  const bool valid = p.lengths == nullptr || p.t < p.lengths[b];
  const bool reset = p.resets != nullptr && p.resets[b];
  if (Cell::kHasC) {
    units.get(p.c_prev, c);
    units.get_if_there(reset ? p.c_reset : p.c_prev, start_c);
  }
  if (valid) {
    Gates a[N], hidden[N];
    units.template get_gates<Cell::kGates>(p.gates_x, p.H, a);
    units.template get_gates<Cell::kGates>(reset ? p.gates_reset : p.gates_h, p.H, hidden);
    if (!Cell::kShared) {
      units.get_if_there(reset ? p.h_reset : p.h_prev, start_h);
      float q[N];
      units.get_if_there(Rows<const Scalar>{p.bias_q, 0}, q);
#pragma unroll
      for (int n = 0; n < N; ++n) hidden[n].at[2] += q[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const StepOutput out = Cell::forward(a[n], hidden[n], {start_h[n], start_c[n]});
      saved[n] = out.saved;
      h[n] = out.next.h;
      c[n] = out.next.c;
    }
  }
  if (Cell::kSaved > 0 && p.gates.data != nullptr) units.template put_gates<Cell::kSaved>(p.gates, p.H, saved);
  if (Cell::kHasC) units.put(p.c, c);
  units.put(p.y, h);
  if (p.h.data != nullptr) {
    if (!valid) units.get(p.h_prev, h);
    units.put(p.h, h);
  }
}

// Leaves of the gradient d of a state that left a row's step nothing where the step after was reset; d_reset gathers it.
template <int N>
__device__ inline void keep(float (&d)[N], bool cut, const Units<N>& units, const Rows<float>& d_reset) {
  if (!cut) return;
  if (d_reset.data != nullptr) {
    float sum[N];
    units.get(d_reset, sum);
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] += d[n];
    units.put(d_reset, sum);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) d[n] = 0.0f;
}

template <typename Cell, typename Scalar, int N>
__global__ void step_backward_kernel(const StepBackward<Scalar> p) {
  const Units<N> units = units_of_thread<N>();
  const int64_t b = units.b;
  if (b >= p.B || units.j >= p.H) return;

  float dh[N], product[N], dc[N] = {};
  units.get_if_there(p.dh, dh);
  units.get_if_there(p.product, product);
#pragma unroll
  for (int n = 0; n < N; ++n) dh[n] += product[n];
  const bool cut = p.resets_after != nullptr && p.resets_after[b];
  keep(dh, cut, units, p.dh_reset);
  if (Cell::kHasC) {
    units.get(p.dc, dc);
    keep(dc, cut, units, p.dc_reset);
  }
  Gates da[N], db[N];
  if (p.lengths == nullptr || p.t < p.lengths[b]) {
    float dy[N], start_h[N] = {}, start_c[N] = {}, h[N] = {}, c[N] = {};
    Gates saved[N];
    units.get_if_there(p.dy, dy);
    if (Cell::kSaved > 0) units.template get_gates<Cell::kSaved>(p.gates, p.H, saved);
    if (Cell::kSaved == 0) units.get(p.y, h);
    if (!Cell::kShared) units.get(p.h_prev, start_h);
    if (Cell::kHasC) {
      units.get(p.c, c);
      units.get_if_there(p.resets != nullptr && p.resets[b] ? p.c_reset : p.c_prev, start_c);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const StepGradient out = Cell::backward(saved[n], {start_h[n], start_c[n]}, {h[n], c[n]}, {dh[n] + dy[n], dc[n]});
      da[n] = out.da;
      db[n] = out.db;
      dh[n] = out.previous.h;
      dc[n] = out.previous.c;
    }
  }
  if (p.dh.data != nullptr) units.put(p.dh, dh);
  if (Cell::kHasC) units.put(p.dc, dc);
  units.template put_gates<Cell::kGates>(p.da, p.H, da);
  if (!Cell::kShared) units.template put_gates<Cell::kGates>(p.db, p.H, db);
}

}  // namespace rnnattn::cuda
