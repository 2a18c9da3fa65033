// Run-time values to template parameters, in one place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace rnnattn {

// Calls run(F{}) with F the accumulation type of a dtype: double for double, else float.
template <typename Run>
auto dispatch_accumulation(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kDouble:
      return run(double{});
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
      return run(float{});
    default:
      TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16, got ", dtype);
  }
}

}  // namespace rnnattn
