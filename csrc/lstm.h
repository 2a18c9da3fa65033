// Parameters of one step of an LSTM layer. Pointers are borrowed for the call; F is the
// accumulation type (float or double). Letters: B batch, H hidden size.
#pragma once

#include <cstdint>

namespace rnnattn {

// i, f, o = sigmoid(a), g = tanh(a);  c = f * c_prev + i * g;  h = o * tanh(c)
template <typename F>
struct LstmForwardStep {
  int64_t t;               // this step
  int64_t H;               // hidden size
  const int64_t* lengths;  // [B], or null: row b is valid where t < lengths[b]
  F* gates;                // [B, 4H] in: pre-activations a; out: i, f, g, o (zero in invalid rows)
  const F* c_prev;         // [B, H]
  F* c;                    // [B, H] out, c_prev in invalid rows; may be c_prev itself
  F* h;                    // [B, H] out, row stride h_stride; zero in invalid rows
  int64_t h_stride;
};

// From the gradients of h_t and c_t to those of the pre-activations and of c_{t-1}.
template <typename F>
struct LstmBackwardStep {
  int64_t t;
  int64_t H;
  const int64_t* lengths;  // [B], or null
  const F* dh;             // [B, H], from the later step
  const F* dy;             // [B, H], row stride dy_stride, or null: added to dh
  int64_t dy_stride;
  F* dc;                   // [B, H] in: gradient of c_t; out: of c_{t-1} (kept in invalid rows)
  const F* gates;          // [B, 4H], activated
  const F* c;              // [B, H]
  const F* c_prev;         // [B, H]
  F* d_gates;              // [B, 4H] out, zero in invalid rows; may be gates itself
};

// out = a w, or out += a w
template <typename F>
struct RowsProduct {
  int64_t rows, K, N;
  const F* a;  // [rows, K], row stride a_stride
  int64_t a_stride;
  const F* w;  // [K, N]
  F* out;      // [rows, N], row stride out_stride
  int64_t out_stride;
  bool add;
};

}  // namespace rnnattn
