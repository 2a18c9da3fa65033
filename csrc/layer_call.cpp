#include "layer_call.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "call_arguments.h"
#include "cpu/layer.h"
#include "layer_function.h"
#include "plain.h"

namespace rnnattn {
namespace {

// Whether the weights of all layers and directions are of the sizes that the first two tell.
bool are_of_one_stack(at::TensorList weights, size_t layers, size_t directions, bool has_biases, Mode mode) {
  const size_t scans = layers * directions, each = weights.size() / scans, least = has_biases ? 4 : 2;
  const bool projected = mode == Mode::kLstm && each == least + 1;
  if (weights.size() % scans || each != least + projected || weights[0].dim() != 2 || weights[1].dim() != 2) return false;
  const int64_t rows = weights[0].size(0), H = rows / weight_gates(mode), I = weights[0].size(1), R = weights[1].size(1);
  if (H == 0 || R == 0 || rows != weight_gates(mode) * H || (!projected && R != H)) return false;
  for (size_t n = 0; n < weights.size(); ++n) {
    const size_t at = n % each;
    const int64_t features = n < each * directions ? I : static_cast<int64_t>(directions) * R;
    const int64_t shape[] = {at == least ? R : rows, at == 0 ? features : at == 1 ? R : H};
    const bool is_bias = at >= 2 && at < least;
    if (weights[n].sizes() != at::IntArrayRef(shape, is_bias ? 1 : 2)) return false;
  }
  return true;
}

// What the module returns. None where a check is due, or anything out of the ordinary: the caller then goes the long way.
PyObject* call_layer(PyObject* input, PyObject* h, PyObject* c, PyObject* lengths, const pybind11::list& given_weights,
                     PyObject* given_dtype, const std::string& mode_name, int64_t layers, PyObject* given_dropout, bool has_biases,
                     bool bidirectional, bool batch_first, bool is_cell) {
  const double dropout = PyFloat_AsDouble(given_dropout);
  if (PyErr_Occurred()) PyErr_Clear();
  if (!(dropout >= 0 && dropout <= 1)) Py_RETURN_NONE;  // -1 is an error's
  if (!plain_thread() || given_weights.size() < 2 || !THPDtype_Check(given_dtype)) Py_RETURN_NONE;
  const Precision precision{reinterpret_cast<THPDtype*>(given_dtype)->scalar_type, at::autocast::is_autocast_enabled(at::kCPU)};
  if (precision.autocast && precision.dtype != at::autocast::get_autocast_dtype(at::kCPU)) Py_RETURN_NONE;
  std::vector<Tensor> weights;
  weights.reserve(given_weights.size());
  for (const auto& w : given_weights) {
    auto plain = plain_tensor(w.ptr(), precision);
    if (!plain) Py_RETURN_NONE;
    weights.push_back(*std::move(plain));
  }
  const size_t directions = bidirectional ? 2 : 1;
  const Mode mode = parse_mode(mode_name);
  if (!are_of_one_stack(weights, layers, directions, has_biases, mode)) Py_RETURN_NONE;
  const Called module{{batch_first, is_cell}, mode == Mode::kLstm, precision, weights[0].size(1), layers * static_cast<int64_t>(directions),
                      weights[1].size(1), weights[0].size(0) / weight_gates(mode)};
  const auto arguments = call_arguments(module, input, h, c, lengths);
  if (!arguments) Py_RETURN_NONE;
  Tensor y, h_n, c_n;
  {
    pybind11::gil_scoped_release others_run;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    RECORD_FUNCTION("rnnattn_native::recurrent_layer", std::vector<c10::IValue>{});
    const LayerSettings settings{module.layout, mode_name, has_biases, bidirectional, arguments->lengths};
    std::tie(y, h_n, c_n) = differentiable_stack(*arguments, weights, layers, dropout, settings);
  }
  return call_results(module, arguments->unbatched, std::move(y), std::move(h_n), std::move(c_n));
}

}  // namespace

void bind_layer_call(pybind11::module_& m) {
  m.def("call_layer",
        [](pybind11::handle input, pybind11::handle h, pybind11::handle c, pybind11::handle lengths, const pybind11::list& weights,
           pybind11::handle dtype, const std::string& mode, int64_t layers, pybind11::handle dropout, bool has_biases, bool bidirectional,
           bool batch_first, bool is_cell) {
          return pybind11::reinterpret_steal<pybind11::object>(call_layer(input.ptr(), h.ptr(), c.ptr(), lengths.ptr(), weights, dtype.ptr(),
                                                                          mode, layers, dropout.ptr(), has_biases, bidirectional,
                                                                          batch_first, is_cell));
        },
        "A module's arguments, and weights of that dtype, to its results, or None.");
}

}  // namespace rnnattn
