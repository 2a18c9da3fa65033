// Fresh memory in huge pages: the first write to a 33 MB tensor of 4 KB pages spends 25 ms in page
// faults, more than the kernel that writes it. A hint that the system may ignore.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnattn {

inline void advise_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline const at::Tensor& in_huge_pages(const at::Tensor& t) {
  advise_huge_pages(t.const_data_ptr(), t.nbytes());
  return t;
}

}  // namespace rnnattn
