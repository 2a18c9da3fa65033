// The arguments and results of a module between its callers' layout and the kernels'.
#pragma once

#include <ATen/core/Tensor.h>

namespace rnnattn {

// How callers lay out what the kernels take as [T, B, ...] and, of states, [LK, B, ...].
struct Layout {
  bool batch_first = false;
  bool is_cell = false;  // T and LK are 1 and left out
};

struct CallArguments {
  at::Tensor x, h0, c0;    // in the caller's layout; c0 is undefined without a cell state
  at::Tensor lengths;      // int64 [B], undefined for none
  bool unbatched = false;  // the caller left out B, which is 1
};

// x, y and states from one to the other; undefined ones stay so.
inline at::Tensor sequence_to_kernel(const Layout& layout, const at::Tensor& t) {
  return !t.defined() ? t : layout.is_cell ? t.unsqueeze(0) : layout.batch_first ? t.transpose(0, 1) : t;
}
inline at::Tensor sequence_from_kernel(const Layout& layout, const at::Tensor& t) {
  return !t.defined() ? t : layout.is_cell ? t.squeeze(0) : layout.batch_first ? t.transpose(0, 1) : t;
}
inline at::Tensor state_to_kernel(const Layout& layout, const at::Tensor& t) { return t.defined() && layout.is_cell ? t.unsqueeze(0) : t; }
inline at::Tensor state_from_kernel(const Layout& layout, const at::Tensor& t) { return t.defined() && layout.is_cell ? t.squeeze(0) : t; }

}  // namespace rnnattn
