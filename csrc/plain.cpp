#include "plain.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>

namespace rnnattn {
namespace {

using c10::DispatchKey;

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet others) { return (keys | others) == others; }

}  // namespace

bool plain_thread() {
  constexpr c10::DispatchKeySet usual =
      c10::default_included_set | c10::autocast_dispatch_keyset | c10::DispatchKeySet(DispatchKey::ADInplaceOrView);
  return within(c10::impl::tls_local_dispatch_key_set().included_, usual) && !at::impl::torch_function_mode_enabled() &&
         !at::SavedTensorDefaultHooks::get_hooks();
}

bool is_plain(const at::Tensor& t, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet usual{DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU};
  return within(t.key_set(), usual) && t.is_cpu() && t.scalar_type() == dtype && !t._fw_grad(0).defined();
}

bool records_gradients() {
  return c10::GradMode::is_enabled() && !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutogradCPU);
}

}  // namespace rnnattn
