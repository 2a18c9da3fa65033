// Tensors that may be absent.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace rnnattn {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

}  // namespace rnnattn
