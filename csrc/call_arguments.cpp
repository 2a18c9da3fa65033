#include "call_arguments.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plain.h"

namespace rnnattn {
namespace {

using at::Tensor;

bool state(const Called& module, PyObject* object, const Tensor& x, int64_t features, Tensor& out) {
  const int64_t B = x.size(module.layout.batch_first || module.layout.is_cell ? 0 : 1);
  const int64_t shape[] = {module.LK, B, features};
  const auto expected = at::IntArrayRef(shape).slice(module.layout.is_cell);
  if (object == Py_None) {
    out = at::zeros(expected, x.options());
    return true;
  }
  const Tensor* given = plain_tensor(object, module.dtype);
  if (!given || given->sizes() != expected) return false;
  out = *given;
  return true;
}

}  // namespace

const Tensor* plain_tensor(PyObject* object, at::ScalarType dtype) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t, dtype) ? &t : nullptr;
}

std::optional<CallArguments> call_arguments(const Called& module, PyObject* input, PyObject* h, PyObject* c) {
  const Tensor* x = plain_tensor(input, module.dtype);
  if (!x || x->dim() != (module.layout.is_cell ? 2 : 3) || x->size(-1) != module.I || x->numel() == 0) return std::nullopt;
  if (module.has_c ? (h == Py_None) != (c == Py_None) : c != Py_None) return std::nullopt;
  CallArguments arguments{*x, {}, {}};
  if (!state(module, h, *x, module.R, arguments.h0)) return std::nullopt;
  if (module.has_c && !state(module, c, *x, module.H, arguments.c0)) return std::nullopt;
  return arguments;
}

PyObject* call_results(const Called& module, Tensor y, Tensor h_n, Tensor c_n) {
  const auto object = [](Tensor& t) { return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(t))); };
  pybind11::object states = object(h_n);
  if (module.has_c) states = pybind11::make_tuple(std::move(states), object(c_n));
  return (module.layout.is_cell ? states : pybind11::make_tuple(object(y), std::move(states))).release().ptr();
}

}  // namespace rnnattn
