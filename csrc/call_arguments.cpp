#include "call_arguments.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plain.h"

namespace rnnattn {
namespace {

using at::Tensor;

// Where the rows of a batch are.
int64_t of_sequence(const Layout& layout) { return layout.batch_first || layout.is_cell ? 0 : 1; }
int64_t of_state(const Layout& layout) { return layout.is_cell ? 0 : 1; }

bool state(const Called& module, PyObject* object, const Tensor& x, int64_t B, bool unbatched, int64_t features, Tensor& out) {
  const int64_t shape[] = {module.LK, B, features};
  const auto expected = at::IntArrayRef(shape).slice(module.layout.is_cell);
  if (object == Py_None) {
    out = at::zeros(expected, x.options());
    return true;
  }
  auto given = plain_tensor(object, module.precision);
  if (!given || given->dim() != static_cast<int64_t>(expected.size()) - unbatched) return false;
  out = unbatched ? given->unsqueeze(of_state(module.layout)) : *std::move(given);
  return out.sizes() == expected;
}

}  // namespace

std::optional<Tensor> plain_tensor(PyObject* object, Precision precision) {
  if (!THPVariable_CheckExact(object)) return std::nullopt;
  const Tensor& t = THPVariable_Unpack(object);
  const at::ScalarType dtype = t.scalar_type();
  if (!is_plain(t, dtype)) return std::nullopt;
  if (dtype == precision.dtype) return t;
  if (!precision.autocast || (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16)) return std::nullopt;
  const Tensor cast = at::autocast::cached_cast(precision.dtype, t, at::kCPU);
  // What was cast without gradients while autocast lasts is of no use with them.
  return records_gradients() && t.requires_grad() && !cast.requires_grad() ? t.to(precision.dtype) : cast;
}

std::optional<CallArguments> call_arguments(const Called& module, PyObject* input, PyObject* h, PyObject* c, PyObject* lengths) {
  auto x = plain_tensor(input, module.precision);
  const int64_t rank = module.layout.is_cell ? 2 : 3;
  if (!x || (x->dim() != rank && x->dim() != rank - 1) || x->size(-1) != module.I || x->numel() == 0) return std::nullopt;
  if (module.has_c ? (h == Py_None) != (c == Py_None) : c != Py_None) return std::nullopt;
  const bool ragged = lengths != Py_None, unbatched = !ragged && x->dim() != rank;
  CallArguments arguments{unbatched ? x->unsqueeze(of_sequence(module.layout)) : *std::move(x), {}, {}, {}, unbatched};
  if (ragged) {
    auto given = plain_tensor(lengths, {at::kLong, false});
    if (!given || given->dim() != 1 || !given->is_contiguous() || given->numel() == 0) return std::nullopt;
    arguments.lengths = *std::move(given);
  }
  const int64_t B = ragged ? arguments.lengths.size(0) : arguments.x.size(of_sequence(module.layout));
  if (arguments.x.dim() == rank && arguments.x.size(of_sequence(module.layout)) != B) return std::nullopt;
  if (!state(module, h, arguments.x, B, unbatched, module.R, arguments.h0)) return std::nullopt;
  if (module.has_c && !state(module, c, arguments.x, B, unbatched, module.H, arguments.c0)) return std::nullopt;
  return arguments;
}

PyObject* call_results(const Called& module, bool unbatched, Tensor y, Tensor h_n, Tensor c_n) {
  if (unbatched) {
    if (!module.layout.is_cell) y = y.squeeze(of_sequence(module.layout));
    h_n = h_n.squeeze(of_state(module.layout));
    if (module.has_c) c_n = c_n.squeeze(of_state(module.layout));
  }
  const auto object = [](Tensor& t) { return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(t))); };
  pybind11::object states = object(h_n);
  if (module.has_c) states = pybind11::make_tuple(std::move(states), object(c_n));
  return (module.layout.is_cell ? states : pybind11::make_tuple(object(y), std::move(states))).release().ptr();
}

}  // namespace rnnattn
