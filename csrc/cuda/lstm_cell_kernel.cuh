// The pointwise part of one LSTM step. A thread owns N neighbouring hidden units of one row.
//
// Equations: rnnattn/reference/lstm.py. Block (x: units / N, y: rows), grid (x: rows, y: units):
// the row index takes the grid's wide dimension.
#pragma once

#include "cell_math.cuh"
#include "lstm_cell.h"
#include "vector.cuh"

namespace rnnattn::cuda {

template <typename Scalar, int N>
__device__ inline void load_gates(const Scalar* row, int64_t H, int64_t j, float (&a)[4][N]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load(row + k * H + j, a[k]);
}

template <typename Scalar, int N>
__device__ inline void store_gates(Scalar* row, int64_t H, int64_t j, const float (&a)[4][N]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) store(row + k * H + j, a[k]);
}

template <typename Scalar, int N>
__global__ void lstm_cell_forward_kernel(const LstmCellForward<Scalar> p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t j = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (b >= p.B || j >= p.H) return;

  float c[N], h[N] = {}, gates[4][N] = {};
  load(p.c_prev.data + b * p.c_prev.stride + j, c);
  const bool valid = p.lengths == nullptr || p.t < p.lengths[b];
  if (valid) {
    float a[4][N], r[4][N];
    load_gates(p.gates_x.data + b * p.gates_x.stride, p.H, j, a);
    load_gates(p.gates_h.data + b * p.gates_h.stride, p.H, j, r);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Gates before{a[0][n] + r[0][n], a[1][n] + r[1][n], a[2][n] + r[2][n], a[3][n] + r[3][n]};
      const CellOutput out = cell_forward(before, c[n]);
      gates[0][n] = out.gates.i;
      gates[1][n] = out.gates.f;
      gates[2][n] = out.gates.g;
      gates[3][n] = out.gates.o;
      c[n] = out.c;
      h[n] = out.h;
    }
  }
  if (p.gates.data != nullptr) store_gates(p.gates.data + b * p.gates.stride, p.H, j, gates);
  store(p.c.data + b * p.c.stride + j, c);
  store(p.y.data + b * p.y.stride + j, h);
  if (p.h.data != nullptr) {
    if (!valid) load(p.h_prev.data + b * p.h_prev.stride + j, h);
    store(p.h.data + b * p.h.stride + j, h);
  }
}

template <typename Scalar, int N>
__global__ void lstm_cell_backward_kernel(const LstmCellBackward<Scalar> p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t j = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (b >= p.B || j >= p.H) return;

  float d_gates[4][N] = {};
  if (p.lengths == nullptr || p.t < p.lengths[b]) {
    float s[4][N], c[N], c_prev[N], dh[N], dc[N];
    load_gates(p.gates.data + b * p.gates.stride, p.H, j, s);
    load(p.c.data + b * p.c.stride + j, c);
    load(p.c_prev.data + b * p.c_prev.stride + j, c_prev);
    load(p.dh.data + b * p.dh.stride + j, dh);
    load(p.dc.data + b * p.dc.stride + j, dc);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Gates gates{s[0][n], s[1][n], s[2][n], s[3][n]};
      const CellGradient out = cell_backward(gates, c[n], c_prev[n], dh[n], dc[n]);
      d_gates[0][n] = out.d_gates.i;
      d_gates[1][n] = out.d_gates.f;
      d_gates[2][n] = out.d_gates.g;
      d_gates[3][n] = out.d_gates.o;
      dc[n] = out.dc_prev;
    }
    store(p.dc.data + b * p.dc.stride + j, dc);
  }
  store_gates(p.d_gates.data + b * p.d_gates.stride, p.H, j, d_gates);
}

}  // namespace rnnattn::cuda
