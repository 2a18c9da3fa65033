// Parameters of the pointwise part of one LSTM step. All memory is the caller's, on one device.
//
// B batch, H hidden size; gates stand as i, f, g, o in a row of 4H. Scalar is float, __half or
// __nv_bfloat16. Row b is valid at step t where t < lengths[b]; dh of an invalid row is not read.
#pragma once

#include "rows.h"

namespace rnnattn::cuda {

template <typename Scalar>
struct LstmCellForward {
  int64_t B;
  int64_t H;
  int64_t t;                  // the step, for lengths
  const int64_t* lengths;     // [B], or null: every row is valid
  Rows<const float> gates_x;  // [B, 4H] W_ih x_t + b_ih + b_hh
  Rows<const float> gates_h;  // [B, 4H] W_hh h_{t-1}
  Rows<const float> c_prev;   // [B, H]
  Rows<const Scalar> h_prev;       // [B, H] what an invalid row of h keeps; absent without h or lengths
  Rows<Scalar> gates;              // [B, 4H] out, after the activation, zero in invalid rows; may be absent
  Rows<float> c;              // [B, H] out, c_prev in invalid rows
  Rows<Scalar> y;                  // [B, H] out, h_t, zero in invalid rows
  Rows<Scalar> h;                  // [B, H] out, h_t, h_prev in invalid rows; may be absent
};

template <typename Scalar>
struct LstmCellBackward {
  int64_t B;
  int64_t H;
  int64_t t;                 // the step, for lengths
  const int64_t* lengths;    // [B], or null: every row is valid
  Rows<const float> dh;      // [B, H] the whole gradient of o * tanh(c_t)
  Rows<float> dc;            // [B, H] in: gradient of c_t, out: of c_{t-1}; kept in invalid rows
  Rows<const Scalar> gates;       // [B, 4H] after the activation
  Rows<const float> c;       // [B, H]
  Rows<const float> c_prev;  // [B, H]
  Rows<Scalar> d_gates;           // [B, 4H] out, before the activation, zero in invalid rows
};

}  // namespace rnnattn::cuda
