#include "prepared_call.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "call_arguments.h"
#include "cpu/layer.h"
#include "cpu/prepared.h"
#include "plain.h"

namespace rnnattn {
namespace {

using at::Tensor;

class PreparedCall {
 public:
  // states: LK, R and H of the initial states. A cell takes [B, I] and [B, H].
  PreparedCall(const pybind11::list& prepared, bool bidirectional, const std::string& mode, const pybind11::object& dtype_of, int64_t I,
               std::tuple<int64_t, int64_t, int64_t> states, bool batch_first, bool is_cell) {
    const auto [LK, R, H] = states;
    std::vector<Tensor> tensors;
    for (const auto& t : prepared) tensors.push_back(THPVariable_Unpack(t.ptr()));
    const Precision precision{THPVariable_Unpack(dtype_of.ptr()).scalar_type(), false};
    module_ = {{batch_first, is_cell}, parse_mode(mode) == Mode::kLstm, precision, I, LK, R, H};
    stack_ = prepared_stack(std::move(tensors), bidirectional, mode, precision.dtype, I, H, R);
  }

  // What the module returns. None where a check is due, or anything out of the ordinary: the caller then goes the long way.
  PyObject* call(PyObject* input, PyObject* h, PyObject* c) const {
    if (!plain_thread()) Py_RETURN_NONE;
    const auto arguments = call_arguments(module_, input, h, c);
    if (!arguments) Py_RETURN_NONE;
    const auto& [x, h0, c0, lengths, unbatched] = *arguments;
    if (c10::GradMode::is_enabled() && (x.requires_grad() || h0.requires_grad() || (c0.defined() && c0.requires_grad()))) Py_RETURN_NONE;
    Tensor y, h_n, c_n;
    {
      pybind11::gil_scoped_release others_run;
      RECORD_FUNCTION("rnnattn_native::prepared_forward", std::vector<c10::IValue>{});
      std::tie(y, h_n, c_n) = stack_->run(sequence_to_kernel(module_.layout, x), state_to_kernel(module_.layout, h0),
                                          c0.defined() ? OptionalTensor(state_to_kernel(module_.layout, c0)) : std::nullopt, {}, {}, false);
      y = sequence_from_kernel(module_.layout, y);
      h_n = state_from_kernel(module_.layout, h_n), c_n = state_from_kernel(module_.layout, c_n);
    }
    return call_results(module_, unbatched, std::move(y), std::move(h_n), std::move(c_n));
  }

 private:
  Called module_;
  std::unique_ptr<PreparedStack> stack_;
};

}  // namespace

void bind_prepared_call(pybind11::module_& m) {
  pybind11::class_<PreparedCall>(m, "PreparedCall", "A prepared module's arguments and packed weights to its results, or None.")
      .def(pybind11::init<const pybind11::list&, bool, const std::string&, const pybind11::object&, int64_t,
                          std::tuple<int64_t, int64_t, int64_t>, bool, bool>())
      .def("__call__", [](const PreparedCall& self, pybind11::handle input, pybind11::handle h, pybind11::handle c) {
        return pybind11::reinterpret_steal<pybind11::object>(self.call(input.ptr(), h.ptr(), c.ptr()));
      });
}

}  // namespace rnnattn
