// Parameters of what lies between the hidden products of two steps of a regularised recurrent layer. All memory is the
// caller's, on one device.
//
// B batch, H hidden size, G gates of H columns in a row of pre-activations, S saved blocks of H (cell_math.cuh; of RNN
// one, h'). Scalar is float, __half or __nv_bfloat16. Row b is valid at step t where t < lengths[b]. What there is not
// has a null pointer.
#pragma once

#include "rows.h"

namespace rnnattn::cuda {

// What both directions read.
struct Regularisation {
  const float* norm_hh;      // [GH], or null; so are all parameters and masks
  const float* norm_c;       // [H] LSTM
  const float* bias_c;       // [H] LSTM
  Rows<const float> h_mask;  // [B, H]
  Rows<const bool> keep_h;   // [B, H] True where the state before is kept
  Rows<const bool> keep_c;   // [B, H] LSTM
  float zoneout_h;           // the share that is kept, without a mask
  float zoneout_c;
  const int64_t* lengths;    // [B], or null: every row is valid
  int64_t t;                 // the step, for lengths
};

template <typename Scalar>
struct RegularisedForward {
  int64_t B;
  int64_t H;
  Regularisation by;
  const float* b_hh;          // [GH], or null
  const bool* resets_next;    // [B], or null: rows where the step after starts from other states
  Rows<const float> a;        // [B, GH] the input product and b_ih; not read in invalid rows
  Rows<const float> product;  // [B, GH] W_hh (m * h_{t-1})
  Rows<const float> h_reset;  // [B, H] the other states; zeros if absent
  Rows<const float> c_reset;  // [B, H] LSTM
  Rows<float> h;              // [B, H] in: h_{t-1}; out: what the step after starts from
  Rows<float> c;              // [B, H] likewise; LSTM
  Rows<Scalar> operand;       // [B, H] out, m * h for the next product: this,
  Rows<float> operand_fp32;   // [B, H] or this
  Rows<Scalar> y;             // [B, H] out, h_t; zero in invalid rows, as all that follows
  Rows<float> cells;          // [B, H] out, c_t; LSTM
  Rows<Scalar> gates;         // [B, SH] out; may be absent
  Rows<Scalar> hidden;        // [B, GH] out, the normalised product; may be absent
  float* rstd;                // [B] out, one over the product's standard deviation; may be null
};

template <typename Scalar>
struct RegularisedBackward {
  int64_t B;
  int64_t H;
  Regularisation by;
  const bool* resets_after;    // [B], or null: rows where the step after took no state from this one
  Rows<const Scalar> dy;       // [B, H] not read in invalid rows; may be absent
  Rows<const float> dcells;    // [B, H] not read in invalid rows; may be absent; LSTM
  Rows<const float> product;   // [B, H] what the step after passes through W_hh, without m; may be absent
  Rows<float> dh;              // [B, H] in: the rest of the gradient of h_t; out: of h_{t-1}
  Rows<float> dc;              // [B, H] in: gradient of c_t; out: of c_{t-1}; LSTM
  Rows<const Scalar> h_prev;   // [B, H] what the step started from; GRU
  Rows<const float> c_prev;    // [B, H] LSTM
  Rows<const Scalar> gates;    // [B, SH]
  Rows<const Scalar> hidden;   // [B, GH] with norm_hh
  const float* rstd;           // [B] with norm_hh
  Rows<float> dh_reset;        // [B, H] in and out: sums of what the steps after did not take; may be absent
  Rows<float> dc_reset;        // [B, H] LSTM
  Rows<float> d_norm_c;        // [B, H] in and out: sums; may be absent; LSTM
  Rows<float> d_bias_c;        // [B, H] likewise
  Rows<float> da;              // [B, GH] out, gradient of a; zero in invalid rows, as all that follows
  Rows<float> db;              // [B, GH] out, of b where that is another; GRU
  Rows<float> d_hidden;        // [B, GH] out, of the product, with norm_hh
};

}  // namespace rnnattn::cuda
