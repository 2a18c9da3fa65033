// Calls and tensors that nothing stands between and the kernels: what is not plain is the dispatcher's.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnnattn {

// Whether nobody but autograd and autocast takes part in calls on this thread: no mode, no transform, no tracer; nor
// hooks on what is saved for a backward, whose owner may compare it with what the same call saves another time.
bool plain_thread();

// Whether a tensor is a dense one on the CPU of that dtype that nothing but a backward looks at.
bool is_plain(const at::Tensor& t, at::ScalarType dtype);

// Whether autograd follows what is called now.
bool records_gradients();

}  // namespace rnnattn
