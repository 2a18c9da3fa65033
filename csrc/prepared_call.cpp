#include "prepared_call.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "cpu/prepared.h"

namespace rnnattn {
namespace {

using at::Tensor;

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet others) { return (keys | others) == others; }

// Whether nobody but autograd and autocast takes part in calls on this thread: no mode, no transform, no tracer.
bool plain_thread() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual =
      c10::default_included_set | c10::autocast_dispatch_keyset | c10::DispatchKeySet(DispatchKey::ADInplaceOrView);
  return within(c10::impl::tls_local_dispatch_key_set().included_, usual) && !at::impl::torch_function_mode_enabled();
}

class PreparedCall {
 public:
  // states: L K, R and H of the initial states. A cell takes [B, I] and [B, H].
  PreparedCall(const pybind11::list& prepared, bool bidirectional, const std::string& mode, const pybind11::object& dtype_of, int64_t I,
               std::tuple<int64_t, int64_t, int64_t> states, bool batch_first, bool is_cell)
      : I_(I), batch_first_(batch_first), is_cell_(is_cell), has_c_(mode == "LSTM") {
    std::tie(LK_, R_, H_) = states;
    std::vector<Tensor> tensors;
    for (const auto& t : prepared) tensors.push_back(THPVariable_Unpack(t.ptr()));
    dtype_ = THPVariable_Unpack(dtype_of.ptr()).scalar_type();
    stack_ = prepared_stack(std::move(tensors), bidirectional, mode, dtype_, I, H_, R_);
  }

  // (y, h_n, c_n) or (y, h_n); h and c may be None for zeros. None where a check is due, or anything out of the
  // ordinary: the caller then goes the long way.
  PyObject* call(PyObject* input, PyObject* h, PyObject* c) const {
    if (!plain_thread() || !is_plain(input)) return none();
    Tensor x = THPVariable_Unpack(input);
    if (x.dim() != (is_cell_ ? 2 : 3) || x.size(-1) != I_) return none();
    if (is_cell_) x = x.unsqueeze(0);
    else if (batch_first_) x = x.transpose(0, 1);
    if (x.size(0) == 0) return none();
    if (has_c_ && (h == Py_None) != (c == Py_None)) return none();
    Tensor h0, c0;
    if (!state(h, x, R_, h0) || (has_c_ ? !state(c, x, H_, c0) : c != Py_None)) return none();
    Tensor y, h_n, c_n;
    {
      pybind11::gil_scoped_release others_run;
      RECORD_FUNCTION("rnnattn_native::prepared_forward", std::vector<c10::IValue>{});
      std::tie(y, h_n, c_n) = stack_->run(x, h0, has_c_ ? OptionalTensor(c0) : OptionalTensor(), {}, {}, false);
      if (is_cell_) {
        h_n = h_n.squeeze(0);
        if (has_c_) c_n = c_n.squeeze(0);
      } else if (batch_first_) {
        y = y.transpose(0, 1);
      }
    }
    const auto own = [](Tensor& t) { return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(t))); };
    return has_c_ ? pybind11::make_tuple(own(y), own(h_n), own(c_n)).release().ptr() : pybind11::make_tuple(own(y), own(h_n)).release().ptr();
  }

 private:
  static PyObject* none() { Py_RETURN_NONE; }

  // A dense tensor on the CPU in the module's dtype that wants no gradient.
  bool is_plain(PyObject* object) const {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet usual{DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU};
    if (!THPVariable_CheckExact(object)) return false;
    const Tensor& t = THPVariable_Unpack(object);
    return within(t.key_set(), usual) && t.is_cpu() && t.scalar_type() == dtype_ && !(at::GradMode::is_enabled() && t.requires_grad());
  }

  // An initial state of x's rows; zeros for None.
  bool state(PyObject* object, const Tensor& x, int64_t features, Tensor& out) const {
    if (object == Py_None && !is_cell_) {
      out = at::zeros({LK_, x.size(1), features}, x.options());
      return true;
    }
    if (!is_plain(object)) return false;
    const Tensor& given = THPVariable_Unpack(object);
    if (is_cell_ ? given.sizes() != at::IntArrayRef({x.size(1), features}) : given.sizes() != at::IntArrayRef({LK_, x.size(1), features}))
      return false;
    out = is_cell_ ? given.unsqueeze(0) : given;
    return true;
  }

  int64_t I_, LK_, R_, H_;
  bool batch_first_, is_cell_, has_c_;
  at::ScalarType dtype_;
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
