// Parameters of the scans of one direction of a regularised layer on a CPU (equations: rnnattn/reference/regularised.py),
// for those of its rows that one thread computes. Letters, Rows and ownership as in recurrent.h.
#pragma once

#include "recurrent.h"

namespace rnnattn {

constexpr double kNormEpsilon = 1e-5;

// What both scans read; null for what there is not.
template <typename F>
struct RegularisedScan {
  Mode mode;
  Stored stored;        // of h, y and what is saved
  int64_t T, B, H;
  Rows rows;
  const F* w_hh;        // panels; forward: of GH columns, K = H; backward: of H columns, K = GH
  const F* norm_hh;     // [GH]
  const F *norm_c, *bias_c;        // [H]
  const F* h_mask;      // [B, H]
  const bool *keep_h, *keep_c;     // [T, B, H]
  F zoneout_h, zoneout_c;
  Resets<F> resets;     // its h is of F
};

template <typename F>
struct RegularisedForward : RegularisedScan<F> {
  const F* a;           // [T, B, GH]
  const F* b_hh;        // [GH], or null
  F *h, *c;             // [B, H] in: the initial states; out: the last
  void* y;              // stored [T, B, H]
  F* cells;             // [T, B, H]; LSTM
  void* gates;          // stored [T, B, gate columns * H], or null; RNN: h'
  void* hidden;         // stored [T, B, GH], or null: the normalised hidden product
  F* rstd;              // [T, B], or null: one over its standard deviation
};

template <typename F>
struct RegularisedBackward : RegularisedScan<F> {
  const F *dy, *dcells;      // [T, B, H], or null
  const void* h_prev;        // stored [T, B, H], what each step started from
  const F* c_prev;           // [T, B, H]; LSTM
  const void *gates, *hidden;
  const F* rstd;
  F *dh, *dc;                // [B, H] in: gradients of the last states; out: of the initial ones
  F *dh_reset, *dc_reset;    // [B, H] in/out: the gradients of resets.h and c are added, or null
  F* da;                     // [T, B, GH] out
  F* db;                     // [T, B, GH] out, or null where it is da; GRU
  F* d_hidden;               // [T, B, GH] out: of the hidden product; or null where it is that of b
  F *d_norm_c, *d_bias_c;    // [B, H] in/out: sums, or null
};

}  // namespace rnnattn
