// Parameters of attention pooling over one tile: a few kept steps of one row, gathered or in place.
// Pointers are borrowed for the call; F is the accumulation type (float or double).
// Letters: D feature size, A attention size.
#pragma once

#include <cstdint>

namespace rnnattn {

template <typename F>
struct PoolTile {
  int64_t steps;     // steps in the tile
  int64_t D;         // feature size
  const F* x;        // [steps, D], row stride x_stride
  int64_t x_stride;
};

// Running softmax of one row: pooled = acc / sum, lse = max + log(sum).
template <typename F>
struct PoolState {
  F max;
  F sum;
  F* acc;  // [D]
};

// u = tanh(u + b) in place and s = v . u
template <typename F>
struct AdditiveScores {
  int64_t steps;
  int64_t A;
  F* u;         // [steps, A] in: W x; out: tanh(W x + b)
  const F* b;   // [A], or null
  const F* v;   // [A]
  F* s;         // [steps] out
};

// du = ds v (1 - u^2) in place of u;  dv += ds u;  db += du
template <typename F>
struct AdditiveGradient {
  int64_t steps;
  int64_t A;
  F* u;          // [steps, A] in: tanh(W x + b); out: du
  const F* v;    // [A]
  const F* ds;   // [steps]
  F* dv;         // [A] in/out
  F* db;         // [A] in/out
};

}  // namespace rnnattn
