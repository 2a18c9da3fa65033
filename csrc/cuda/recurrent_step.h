// Parameters of the pointwise part of one step of a recurrent cell. All memory is the caller's, on one device.
//
// B batch, H hidden size, G gates of H columns in a row of pre-activations, S saved ones (cell_math.cuh). Scalar is
// float, __half or __nv_bfloat16. Row b is valid at step t where t < lengths[b]; else its state is kept. Where
// resets[b], the step starts from other states: those given, or zeros. Absent rows have a null pointer.
#pragma once

#include "rows.h"

namespace rnnattn::cuda {

template <typename Scalar>
struct StepForward {
  int64_t B;
  int64_t H;
  int64_t t;                      // the step, for lengths
  const int64_t* lengths;         // [B], or null: every row is valid
  const bool* resets;             // [B], or null: no row is reset
  const Scalar* bias_q;           // [H] added to the hidden sum of GRU's n, or null
  Rows<const float> gates_x;      // [B, GH] W_ih x_t and biases
  Rows<const float> gates_h;      // [B, GH] W_hh h_{t-1}
  Rows<const Scalar> h_prev;      // [B, H] GRU; and what an invalid row of h keeps
  Rows<const float> c_prev;       // [B, H] LSTM
  Rows<const float> gates_reset;  // [B, GH] in the place of gates_h; zeros if absent
  Rows<const Scalar> h_reset;     // [B, H] GRU
  Rows<const float> c_reset;      // [B, H] LSTM
  Rows<Scalar> gates;             // [B, SH] out, zero in invalid rows; may be absent
  Rows<float> c;                  // [B, H] out, c_prev in invalid rows; LSTM
  Rows<Scalar> y;                 // [B, H] out, h_t, zero in invalid rows
  Rows<Scalar> h;                 // [B, H] out, h_t, h_prev in invalid rows; may be absent
};

template <typename Scalar>
struct StepBackward {
  int64_t B;
  int64_t H;
  int64_t t;
  const int64_t* lengths;
  const bool* resets;          // [B] of this step, or null
  const bool* resets_after;    // [B] of the step after, which took no state from this one; or null
  Rows<const Scalar> dy;       // [B, H] not read in invalid rows; may be absent
  Rows<const float> product;   // [B, H] what the step after passes through W_hh; may be absent
  Rows<float> dh;              // [B, H] in: the rest of the gradient of h_t, out: of h_{t-1}; may be absent for zero
  Rows<float> dc;              // [B, H] in: gradient of c_t, out: of c_{t-1}; kept in invalid rows; LSTM
  Rows<const Scalar> gates;    // [B, SH]
  Rows<const Scalar> y;        // [B, H] RNN
  Rows<const Scalar> h_prev;   // [B, H] what the step started from; GRU
  Rows<const float> c;         // [B, H] LSTM
  Rows<const float> c_prev;    // [B, H] LSTM
  Rows<const float> c_reset;   // [B, H] LSTM
  Rows<float> dh_reset;        // [B, H] in and out: sums of what the steps after did not take; may be absent
  Rows<float> dc_reset;        // [B, H] LSTM
  Rows<Scalar> da;             // [B, GH] out, gradient of gates_x, zero in invalid rows
  Rows<Scalar> db;             // [B, GH] out, of gates_h where that is another; GRU
};

}  // namespace rnnattn::cuda
