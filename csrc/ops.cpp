// The schemas of the compiled operators, once; shapes and meaning are those of the functions of the
// same name in rnnattn/reference. The kernels register themselves from csrc/cpu and csrc/cuda.
#include <torch/library.h>

#include "cuda/schemas.h"

TORCH_LIBRARY(rnnattn_native, m) {
  m.def(
      "recurrent_layer_forward(Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, "
      "bool reset_to_initial, bool has_biases, str direction, str mode, bool save) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "recurrent_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor h0, Tensor? c0, "
      "Tensor[] weights, Tensor? lengths, Tensor? resets, bool reset_to_initial, Tensor y, Tensor(a!) gates, Tensor cells, "
      "bool has_biases, str direction, str mode, bool needs_dx, bool needs_dweights, bool overwrites_gates) "
      "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  m.def(
      "regularised_scan_forward(Tensor a, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, Tensor? norm_hh, Tensor? norm_c, "
      "Tensor? bias_c, Tensor? h_mask, Tensor? keep_h, Tensor? keep_c, float zoneout_h, float zoneout_c, Tensor? lengths, "
      "Tensor? resets, bool reset_to_initial, bool reverse, str mode, bool save) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor hidden, Tensor rstd)");
  m.def(
      "regularised_scan_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor h_prev, Tensor? c_prev, "
      "Tensor h0, Tensor? c0, Tensor w_hh, Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, Tensor? h_mask, Tensor? keep_h, "
      "Tensor? keep_c, float zoneout_h, float zoneout_c, Tensor? lengths, Tensor? resets, bool reset_to_initial, bool reverse, "
      "str mode, Tensor gates, Tensor hidden, Tensor rstd) -> Tensor[]");
  m.def(
      "prepare_weights(Tensor[] weights, bool has_biases, int layers, bool bidirectional, str mode, str precision) "
      "-> Tensor[]");
  m.def(
      "prepared_forward(Tensor x, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, bool reset_to_initial, "
      "Tensor[] prepared, bool bidirectional, str mode, int hidden_size) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "attention_pool_forward(Tensor x, Tensor v, Tensor? w, Tensor? b, Tensor? lengths, Tensor? mask, "
      "bool need_weights) -> (Tensor pooled, Tensor weights, Tensor lse)");
  m.def(
      "attention_pool_backward(Tensor? d_pooled, Tensor? d_weights, Tensor x, Tensor v, Tensor? w, Tensor? b, "
      "Tensor? lengths, Tensor? mask, Tensor pooled, Tensor lse) -> (Tensor dx, Tensor dv, Tensor dw, Tensor db)");
  for (const char* schema : rnnattn::cuda::kCudaSchemas) m.def(schema);
}
