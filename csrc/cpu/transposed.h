// Transposed copies of bfloat16 matrices, for GEMMs over the steps of a layer: oneDNN takes twice as long where it is given
// the transposed view of its first operand.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "isa.h"
#include "workspace.h"

namespace rnnattn {

// out [width, n] = rows [n, width] transposed, the elements of a row contiguous in both.
inline void transpose_into(const at::Tensor& out, const at::Tensor& rows) {
  constexpr int64_t kLine = 32, kGrain = 1 << 15;  // rows of a cache line; elements that pay for a thread
  const int64_t n = rows.size(0), width = rows.size(1);
  const auto* from = static_cast<const uint16_t*>(rows.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.data_ptr());
  at::parallel_for(0, (n + kLine - 1) / kLine, std::max<int64_t>(1, kGrain / (kLine * std::max<int64_t>(1, width))), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLine, last = std::min(n, end * kLine);
    kernel_table().bfloat16->transpose_rows(from + first * rows.stride(0), rows.stride(0), last - first, width, to + first, out.stride(0));
  });
}

// [width, n], of which the rows begin at different places of a page. Zeros stand behind each row: oneDNN multiplies what it
// finds there up to the next multiple of 32 by zero, and NaN by zero is NaN.
inline at::Tensor rows_apart(int64_t width, int64_t n, const at::TensorOptions& options) {
  const at::Tensor rows = workspace({width, padded_row(n)}, options);
  rows.narrow(1, n, padded_row(n) - n).zero_();
  return rows.narrow(1, 0, n);
}

}  // namespace rnnattn
