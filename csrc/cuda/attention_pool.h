// Parameters of the softmax pooling kernels. All memory is the caller's, on one device.
//
// B batch, T time, D feature size, A attention size, S parts that the time of a row is split into,
// P blocks that run side by side. Scalar is float, __half or __nv_bfloat16; arrays without strides
// are contiguous. Steps that are not kept are not read.
#pragma once

#include <cstdint>

namespace rnnattn::cuda {

struct Keep {
  const int64_t* lengths;  // [B], keep t < lengths[b]; or null
  const bool* mask;        // [B, T], keep where true; or null
  int64_t mask_stride;     // elements from one row of the mask to the next
};

template <typename Scalar>
struct Sequence {
  const Scalar* data;  // [B, T, D], the elements of a step contiguous
  int64_t stride_b;    // elements from one row to the next
  int64_t stride_t;    // elements from one step to the next
};

// Scores of every step, and the pooled sum of every part of a row relative to its own maximum.
template <typename Scalar>
struct PoolForward {
  int64_t B, T, D, S;
  Sequence<Scalar> x;
  Keep keep;
  const Scalar* v;     // [D] for scores v . x_t; or null: `scores` is given
  float* scores;       // [B, T] in where v is null; else out, -inf where not kept, may be null
  float* partial;      // [B, S, D] out, sum of exp(s_t - m) x_t
  float* partial_m;    // [B, S] out, m: the largest score, -inf where nothing is kept
  float* partial_sum;  // [B, S] out, sum of exp(s_t - m)
};

// Joins the parts.
template <typename Scalar>
struct PoolCombine {
  int64_t B, T, D, S;
  const float* partial;      // [B, S, D]
  const float* partial_m;    // [B, S]
  const float* partial_sum;  // [B, S]
  const float* scores;       // [B, T], -inf where not kept; may be null where weights is
  float* pooled;             // [B, D] out, zero where a row keeps nothing
  float* lse;                // [B] out, -inf where a row keeps nothing
  Scalar* weights;           // [B, T] out; may be null
};

// Linear scores: dx, and what every block adds to dv.
template <typename Scalar>
struct LinearPoolBackward {
  int64_t B, T, D, P;
  Sequence<Scalar> x;
  Keep keep;
  const Scalar* v;         // [D]
  const float* d_pooled;   // [B, D]
  const float* d_weights;  // [B, T], or null
  const float* delta;      // [B] sum over t of p_t dp_t
  const float* lse;        // [B]
  Scalar* dx;              // [B, T, D] out, zero where not kept
  float* dv;               // [P, D] out, sum of ds x, to be summed over P
};

// Additive scores v . tanh(W x_t + b).
template <typename Scalar>
struct AdditiveScores {
  int64_t B, T, D, A;
  Sequence<Scalar> x;
  Keep keep;
  const Scalar* w;  // [A, D]
  const Scalar* b;  // [A], or null
  const Scalar* v;  // [A]
  float* scores;    // [B, T] out, -inf where not kept
};

// Additive scores: the gradient before the tanh, for as many steps as the caller holds W x of.
template <typename Scalar>
struct AdditiveBackward {
  int64_t B, T, D, A, P;
  const float* product;    // [B, T, A] W x_t
  const Scalar* x;         // [B, T, D]
  const Scalar* v;         // [A]
  const Scalar* b;         // [A], or null
  const bool* keep;        // [B, T], or null
  const float* d_pooled;   // [B, D]
  const float* d_weights;  // [B, T], or null
  const float* delta;      // [B] sum over t of p_t dp_t
  const float* lse;        // [B]
  Scalar* du;              // [B, T, A] out, ds v (1 - u^2), zero where not kept
  float* p;                // [B, T] out, the softmax weights
  float* dv;               // [P, A] out, sum of ds u, to be summed over P
  float* db;               // [P, A] out, sum of du, to be summed over P
};

}  // namespace rnnattn::cuda
