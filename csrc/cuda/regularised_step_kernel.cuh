// One step of a regularised recurrent layer, between two hidden products.
//
// Equations: rnnattn/reference/regularised.py. A block has a row, for the norms need all of it; thread n has its units
// n, n + blockDim.x and so on, however many there are. What a thread writes there it reads back without a barrier:
// outputs hold what a later pass over the row needs.
#pragma once

#include "cell_math.cuh"
#include "regularised_step.h"
#include "vector.cuh"

namespace rnnattn::cuda {

constexpr int kRowThreads = 512;       // at most; whole warps
constexpr float kNormEpsilon = 1e-5f;  // the reference's NORM_EPS

template <typename Cell>
constexpr int kSavedBlocks = Cell::kSaved > 0 ? Cell::kSaved : 1;  // of H columns; RNN saves h'

template <typename T>
__device__ inline T* row_of(const Rows<T>& a, int64_t b) {
  return a.data == nullptr ? nullptr : a.data + b * a.stride;
}

template <typename T>
__device__ inline float value_at(const T* row, int64_t k, float absent = 0.0f) {
  return row == nullptr ? absent : to_float(row[k]);
}

template <typename T>
__device__ inline void set_at(T* row, int64_t k, float value) {
  if (row != nullptr) from_float(value, row[k]);
}

template <typename Scalar>
__device__ inline float rounded(float a) {
  Scalar b;
  from_float(a, b);
  return to_float(b);
}

// f(k) for those k < n that are this thread's.
template <typename F>
__device__ inline void for_own(int64_t n, F f) {
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) f(k);
}

struct Moments {
  float mean = 0.0f, rstd = 1.0f;  // rstd: one over the standard deviation

  __device__ float normal(float a) const { return (a - mean) * rstd; }
};

// Of value(k), k < n; to every thread.
template <typename F>
__device__ inline Moments moments(int64_t n, F value) {
  float sum[1] = {}, squares[1] = {};
  for_own(n, [&](int64_t k) { sum[0] += value(k); });
  block_sum(sum);
  const float mean = sum[0] / n;
  for_own(n, [&](int64_t k) {
    const float d = value(k) - mean;
    squares[0] += d * d;
  });
  block_sum(squares);
  return {mean, 1.0f / sqrtf(squares[0] / n + kNormEpsilon)};
}

// The transpose of a normalisation, of n gradients d and normalised values x: rstd * (d - mean(d) - x * mean(d x)).
struct NormBackward {
  float sums[2] = {};  // of d and d * x; means after `finish`

  __device__ void add(float d, float x) {
    sums[0] += d;
    sums[1] += d * x;
  }

  __device__ void finish(int64_t n) {
    block_sum(sums);
    sums[0] /= n;
    sums[1] /= n;
  }

  __device__ float apply(float d, float x, float rstd) const { return rstd * (d - sums[0] - x * sums[1]); }
};

// Zoneout's k: the share that a unit keeps of the state before.
__device__ inline float share_kept(const bool* keep, int64_t j, float zoneout) {
  return keep == nullptr ? zoneout : keep[j] ? 1.0f : 0.0f;
}

__device__ inline float blend(float k, float before, float fresh) {
  return k == 0.0f ? fresh : k == 1.0f ? before : k * before + (1.0f - k) * fresh;
}

__device__ inline bool is_valid(const Regularisation& by, int64_t b) {
  return by.lengths == nullptr || by.t < by.lengths[b];
}

// Grid (x: rows).
template <typename Cell, typename Scalar>
__global__ void __launch_bounds__(kRowThreads) regularised_forward_kernel(const RegularisedForward<Scalar> p) {
  constexpr int G = Cell::kGates, S = kSavedBlocks<Cell>;
  const int64_t b = blockIdx.x, H = p.H;
  const Regularisation& by = p.by;
  const float *a = row_of(p.a, b), *product = row_of(p.product, b), *h_mask = row_of(by.h_mask, b);
  const float *h_reset = row_of(p.h_reset, b), *c_reset = row_of(p.c_reset, b);
  float *h = row_of(p.h, b), *c = row_of(p.c, b), *cells = row_of(p.cells, b);
  float* operand_fp32 = row_of(p.operand_fp32, b);
  Scalar *operand = row_of(p.operand, b), *y = row_of(p.y, b);
  Scalar *gates = row_of(p.gates, b), *hidden = row_of(p.hidden, b);
  const bool restarts = p.resets_next != nullptr && p.resets_next[b];

  const auto leave = [&](int64_t j, States here, States next) {
    set_at(y, j, here.h);
    if (restarts) next = {value_at(h_reset, j), value_at(c_reset, j)};
    h[j] = next.h;
    if constexpr (Cell::kHasC) {
      cells[j] = here.c;
      c[j] = next.c;
    }
    const float taken = next.h * value_at(h_mask, j, 1.0f);
    set_at(operand, j, taken);
    set_at(operand_fp32, j, taken);
  };
  const auto before = [&](int64_t j) {
    if constexpr (Cell::kHasC) return States{h[j], c[j]};
    return States{h[j], 0.0f};
  };

  if (!is_valid(by, b)) {
    for_own(H, [&](int64_t j) {
      for (int k = 0; k < S; ++k) set_at(gates, k * H + j, 0.0f);
      for (int k = 0; k < G; ++k) set_at(hidden, k * H + j, 0.0f);
      leave(j, {}, before(j));
    });
    if (threadIdx.x == 0) set_at(p.rstd, b, 0.0f);
    return;
  }

  Moments of_product;
  if (by.norm_hh != nullptr) {
    of_product = moments(G * H, [&](int64_t k) { return product[k]; });
    if (threadIdx.x == 0) set_at(p.rstd, b, of_product.rstd);
  }
  const auto hidden_sum = [&](int64_t k) {
    return of_product.normal(product[k]) * value_at(by.norm_hh, k, 1.0f) + value_at(p.b_hh, k);
  };
  const auto step = [&](int64_t j) {
    Gates of_a, of_b;
#pragma unroll
    for (int k = 0; k < G; ++k) {
      of_a.at[k] = a[k * H + j];
      of_b.at[k] = hidden_sum(k * H + j);
      if (hidden != nullptr) from_float(of_product.normal(product[k * H + j]), hidden[k * H + j]);
    }
    const StepOutput out = Cell::forward(of_a, of_b, before(j));
#pragma unroll
    for (int k = 0; k < S; ++k) set_at(gates, k * H + j, Cell::kSaved > 0 ? out.saved.at[k] : out.next.h);
    return out.next;
  };
  const auto finish = [&](int64_t j, States fresh) {
    const States old = before(j);
    const States here{rounded<Scalar>(blend(share_kept(row_of(by.keep_h, b), j, by.zoneout_h), old.h, fresh.h)),
                      blend(share_kept(row_of(by.keep_c, b), j, by.zoneout_c), old.c, fresh.c)};
    leave(j, here, here);
  };
  if constexpr (Cell::kHasC) {
    if (by.norm_c != nullptr) {
      for_own(H, [&](int64_t j) { cells[j] = step(j).c; });
      const Moments of_c = moments(H, [&](int64_t j) { return cells[j]; });
      for_own(H, [&](int64_t j) {
        const float fresh_c = cells[j], o = sigmoid(a[3 * H + j] + hidden_sum(3 * H + j));
        finish(j, {o * tanhf(of_c.normal(fresh_c) * to_float(by.norm_c[j]) + value_at(by.bias_c, j)), fresh_c});
      });
      return;
    }
  }
  for_own(H, [&](int64_t j) { finish(j, step(j)); });
}

// What the step after took of the gradient d of a state: nothing where it was reset; d_reset gathers it then.
__device__ inline float taken_by_next(float d, bool cut, float* d_reset, int64_t j) {
  if (!cut) return d;
  if (d_reset != nullptr) d_reset[j] += d;
  return 0.0f;
}

// Grid (x: rows).
template <typename Cell, typename Scalar>
__global__ void __launch_bounds__(kRowThreads) regularised_backward_kernel(const RegularisedBackward<Scalar> p) {
  constexpr int G = Cell::kGates, S = kSavedBlocks<Cell>;
  const int64_t b = blockIdx.x, H = p.H;
  const Regularisation& by = p.by;
  float *dh = row_of(p.dh, b), *dc = row_of(p.dc, b), *da = row_of(p.da, b), *d_hidden = row_of(p.d_hidden, b);
  float* db = Cell::kShared ? da : row_of(p.db, b);
  const Scalar* gates = row_of(p.gates, b);
  const bool valid = is_valid(by, b);
  {
    const float *product = row_of(p.product, b), *h_mask = row_of(by.h_mask, b);
    float *dh_reset = row_of(p.dh_reset, b), *dc_reset = row_of(p.dc_reset, b);
    const bool cut = p.resets_after != nullptr && p.resets_after[b];
    for_own(H, [&](int64_t j) {
      const float through = product == nullptr ? 0.0f : product[j] * value_at(h_mask, j, 1.0f);
      dh[j] = taken_by_next(dh[j] + through, cut, dh_reset, j);
      if constexpr (Cell::kHasC) dc[j] = taken_by_next(dc[j], cut, dc_reset, j);
    });
  }
  if (!valid) {
    for_own(G * H, [&](int64_t k) {
      da[k] = 0.0f;
      db[k] = 0.0f;
      set_at(d_hidden, k, 0.0f);
    });
    return;
  }

  const auto saved = [&](int64_t j) {
    Gates s;
#pragma unroll
    for (int k = 0; k < S; ++k) s.at[k] = to_float(gates[k * H + j]);
    return s;
  };
  const auto before_c = [&](int64_t j) { return value_at(row_of(p.c_prev, b), j); };
  const auto fresh_c = [&](int64_t j) {
    const Gates s = saved(j);
    return s.at[1] * before_c(j) + s.at[0] * s.at[2];
  };
  const auto dh_here = [&](int64_t j) { return dh[j] + value_at(row_of(p.dy, b), j); };
  const auto k_h = [&](int64_t j) { return share_kept(row_of(by.keep_h, b), j, by.zoneout_h); };

  // Of c' by way of its norm: da holds until the next pass the gradient before the norm (i) and the tanh (o).
  const bool normed = Cell::kHasC && by.norm_c != nullptr;
  Moments of_c;
  NormBackward through_c;
  if constexpr (Cell::kHasC) {
    if (normed) {
      of_c = moments(H, fresh_c);
      float *d_norm_c = row_of(p.d_norm_c, b), *d_bias_c = row_of(p.d_bias_c, b);
      for_own(H, [&](int64_t j) {
        const float x = of_c.normal(fresh_c(j)), gain = by.norm_c[j], tanh_c = tanhf(x * gain + value_at(by.bias_c, j));
        const float ds = (1.0f - k_h(j)) * dh_here(j) * to_float(gates[3 * H + j]) * (1.0f - tanh_c * tanh_c);
        if (d_norm_c != nullptr) d_norm_c[j] += ds * x;
        if (d_bias_c != nullptr) d_bias_c[j] += ds;
        da[j] = ds * gain;
        da[3 * H + j] = tanh_c;
        through_c.add(ds * gain, x);
      });
      through_c.finish(H);
    }
  }
  for_own(H, [&](int64_t j) {
    const Gates s = saved(j);
    const float keep = k_h(j), dh_t = dh_here(j);
    States before, here, d{(1.0f - keep) * dh_t, 0.0f};
    StepGradient out;
    if constexpr (Cell::kHasC) {
      const float k_c = share_kept(row_of(by.keep_c, b), j, by.zoneout_c);
      const float dc_t = dc[j] + value_at(row_of(p.dcells, b), j);
      d.c = (1.0f - k_c) * dc_t;
      before.c = before_c(j);
      here.c = fresh_c(j);
      if (normed) {
        d.c += through_c.apply(da[j], of_c.normal(here.c), of_c.rstd);
        out = Cell::backward_of_gates(s, before, da[3 * H + j], d);
      } else {
        out = Cell::backward(s, before, here, d);
      }
      dc[j] = k_c * dc_t + out.previous.c;
    } else {
      if constexpr (!Cell::kShared) before.h = value_at(row_of(p.h_prev, b), j);
      here.h = s.at[0];
      out = Cell::backward(s, before, here, d);
    }
    dh[j] = keep * dh_t + out.previous.h;
#pragma unroll
    for (int k = 0; k < G; ++k) {
      da[k * H + j] = out.da.at[k];
      if constexpr (!Cell::kShared) db[k * H + j] = out.db.at[k];
    }
  });
  if (by.norm_hh == nullptr) return;

  __syncthreads();  // the columns of db, by now other threads'
  const Scalar* hidden = row_of(p.hidden, b);
  NormBackward through;
  for_own(G * H, [&](int64_t k) { through.add(db[k] * by.norm_hh[k], to_float(hidden[k])); });
  through.finish(G * H);
  for_own(G * H, [&](int64_t k) {
    d_hidden[k] = through.apply(db[k] * by.norm_hh[k], to_float(hidden[k]), p.rstd[b]);
  });
}

}  // namespace rnnattn::cuda
