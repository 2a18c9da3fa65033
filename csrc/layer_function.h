// Recurrent layers as autograd functions in C++; rnnattn/autograd/recurrent.py has the one for all backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

#include "layout.h"

namespace rnnattn {

struct LayerSettings {
  Layout layout;
  std::string mode;
  bool has_biases, bidirectional;
  at::Tensor lengths;  // int64 [B], undefined for none; of packed rows x [N, I] they fall
};

// y, h_n and c_n (undefined without a cell state) in the caller's layout, with a graph where a gradient is wanted. States are
// of all layers, weights of one after the other; dropout is in between.
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable_stack(const CallArguments& arguments, at::TensorList weights, int64_t layers,
                                                                    double dropout, const LayerSettings& settings);

}  // namespace rnnattn
