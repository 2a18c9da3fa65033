// One recurrent layer as an autograd function in C++; rnnattn/autograd/recurrent.py has the one for all backends.
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
};

// y, h_n and c_n (undefined without a cell state) in the caller's layout, with a graph where a gradient is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable_layer(const CallArguments& arguments, at::TensorList weights,
                                                                    const LayerSettings& settings);

}  // namespace rnnattn
