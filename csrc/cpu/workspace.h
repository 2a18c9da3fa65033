// Memory for the large tensors of a layer that its caller does not see or does not keep: packed weights, gates and
// cell states saved for the backward. What is freed stays with the process for the next call, up to a limit: to find
// and to clear fresh pages takes the system longer than the kernels need to write them.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnnattn {

// An uninitialised tensor, in huge pages where it is large. Not resizable.
at::Tensor workspace(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives back to the system what is free, and tells how many bytes that were.
int64_t empty_workspace_cache();

}  // namespace rnnattn
