// What every launcher needs of torch, through its stable headers alone: checks of tensors with
// messages that name them, the choice of dtype and vector width, and the launch itself.
#pragma once

// Only what torch has had since 2.10, so that one build of these sources serves later versions too.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION ((2ULL << 56) | (10ULL << 48))
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "rows.h"

#ifdef RNNATTN_EMULATE_CUDA  // tests run the kernels on the CPU: tests/cuda_emulation
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RNNATTN_LIBRARY rnnattn_native
#define RNNATTN_DISPATCH_KEY CUDA
#endif

namespace rnnattn::cuda {

using torch::headeronly::ScalarType;
constexpr ScalarType kFloat = ScalarType::Float;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifndef RNNATTN_EMULATE_CUDA
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline bool on_device(const Tensor& a) { return a.is_cuda(); }

// Launches on the current stream of the device, which the guard in `Operation` has made current.
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, int device, const Params& params) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "rnnattn: a kernel did not start: ", cudaGetErrorString(error));
}
#endif

// One call of an operator: makes the device of its first tensor current, and checks the others against it.
class Operation {
 public:
  Operation(const char* name, const Tensor& first)
      : name_(name), device_(checked_device(name, first)), guard_(device_) {}

  int device() const { return device_; }

  // Checks dtype, shape, device and that the elements of a row (the last dimension) are contiguous.
  void check(const char* argument, const Tensor& a, ScalarType dtype, std::initializer_list<int64_t> shape) const {
    bool same = a.dim() == static_cast<int64_t>(shape.size());
    for (size_t k = 0; same && k < shape.size(); ++k) same = a.size(k) == shape.begin()[k];
    STD_TORCH_CHECK(same, describe(argument), "expected shape ", list(shape), ", got ", list(a.sizes()));
    STD_TORCH_CHECK(a.scalar_type() == dtype, describe(argument), "expected dtype ",
                    torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(a.scalar_type()));
    STD_TORCH_CHECK(on_device(a) && a.get_device_index() == device_, describe(argument),
                    "expected a tensor on CUDA device ", device_, ", got device index ", a.get_device_index(),
                    on_device(a) ? "" : " of another kind of device");
    const int64_t last = a.dim() - 1;
    STD_TORCH_CHECK(last < 0 || a.size(last) <= 1 || a.stride(last) == 1, describe(argument),
                    "expected stride 1 in the last dimension, got ", a.stride(last));
  }

  void check(const char* argument, const OptionalTensor& a, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    if (a) check(argument, *a, dtype, shape);
  }

  // As `check`, and all of it contiguous.
  void check_dense(const char* argument, const OptionalTensor& a, ScalarType dtype,
                   std::initializer_list<int64_t> shape) const {
    check(argument, a, dtype, shape);
    STD_TORCH_CHECK(!a || a->is_contiguous(), describe(argument), "expected a contiguous tensor, got strides ",
                    list(a->strides()));
  }

 private:
  static int checked_device(const char* name, const Tensor& first) {
    STD_TORCH_CHECK(on_device(first), "rnnattn ", name, ": first argument: expected a tensor on a CUDA device");
    return first.get_device_index();
  }

  std::string describe(const char* argument) const { return std::string("rnnattn ") + name_ + ": " + argument + ": "; }

  template <typename List>
  static std::string list(const List& values) {
    std::ostringstream out;
    out << "[";
    for (auto value = values.begin(); value != values.end(); ++value) {
      out << (value == values.begin() ? "" : ", ") << *value;
    }
    out << "]";
    return out.str();
  }

  const char* name_;
  int device_;
  DeviceGuard guard_;
};

template <typename T>
T* pointer(const OptionalTensor& a) {
  return a ? static_cast<T*>(a->data_ptr()) : nullptr;
}

// A matrix [B, width] as rows; its shape has been checked.
template <typename T>
Rows<T> rows(const OptionalTensor& a) {
  return a ? Rows<T>{static_cast<T*>(a->data_ptr()), a->stride(0)} : Rows<T>{};
}

// Whether vectors of `bytes` never straddle: all addresses of rows are multiples of it.
template <typename T>
bool aligned(const Rows<T>& a, size_t bytes) {
  return reinterpret_cast<uintptr_t>(a.data) % bytes == 0 && a.stride * sizeof(T) % bytes == 0;
}

// Calls f with a value of the element type.
template <typename F>
void dispatch(const char* operation, ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) {
    f(float{});
  } else if (dtype == ScalarType::Half) {
    f(__half{});
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "rnnattn ", operation,
                    ": expected dtype Float, Half or BFloat16, got ", torch::headeronly::toString(dtype));
    f(__nv_bfloat16{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of two that is at least a, at most `limit`.
inline unsigned power_of_two(int64_t a, unsigned limit) {
  unsigned p = 1;
  while (p < a && p < limit) p *= 2;
  return p;
}

}  // namespace rnnattn::cuda
