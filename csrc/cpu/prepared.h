// A stack of recurrent layers whose weights were packed once.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string_view>
#include <tuple>
#include <vector>

#include "../optional_tensor.h"

namespace rnnattn {

class PreparedStack {
 public:
  virtual ~PreparedStack() = default;

  // y, h_n and c_n (undefined without a cell state); x [T, B, I] or packed, h0 [L K, B, R], c0 [L K, B, H].
  virtual std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x, const at::Tensor& h0, const OptionalTensor& c0,
                                                             const OptionalTensor& lengths, const OptionalTensor& resets,
                                                             bool reset_to_initial) const = 0;
};

// From the tensors of the operator prepare_weights, for I inputs, H units and R outputs.
std::unique_ptr<PreparedStack> prepared_stack(std::vector<at::Tensor> prepared, bool bidirectional, std::string_view mode,
                                              at::ScalarType dtype, int64_t I, int64_t H, int64_t R);

}  // namespace rnnattn
