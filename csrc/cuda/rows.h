// A matrix in global memory: rows may be strided, the elements of a row are contiguous.
#pragma once

#include <cstdint>

namespace rnnattn::cuda {

template <typename T>
struct Rows {
  T* data = nullptr;   // first element, owned by the caller; null where an optional matrix is absent
  int64_t stride = 0;  // elements from one row to the next
};

}  // namespace rnnattn::cuda
