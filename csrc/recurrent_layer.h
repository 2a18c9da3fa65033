// The operators on one recurrent layer (ops.cpp has their schemas), as functions for callers in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "optional_tensor.h"

namespace rnnattn {

// y, h_n, c_n, gates, cells; empty where there is no such thing.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrent_layer_forward(
    const at::Tensor& x, const at::Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& lengths,
    const OptionalTensor& resets, bool reset_to_initial, bool has_biases, std::string_view direction, std::string_view mode,
    bool save);

// What a backward is to compute beside dc0. Without dh0, its memory holds anything.
struct Wanted {
  bool dx, dh0, dweights;
};

// dx, dh0, dc0, and a gradient for each weight that has its own.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> recurrent_layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const OptionalTensor& dcells,
    const at::Tensor& x, const at::Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& lengths,
    const OptionalTensor& resets, bool reset_to_initial, const at::Tensor& y, const at::Tensor& gates, const at::Tensor& cells,
    bool has_biases, std::string_view direction, std::string_view mode, Wanted wanted, bool overwrites_gates);

}  // namespace rnnattn
