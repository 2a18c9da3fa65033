// What a call of a module from Python gives and gets, between Python's objects and tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "layout.h"

namespace rnnattn {

// The type that a call computes in. By autocast other floating tensors are cast to it, parameters once while it lasts.
struct Precision {
  at::ScalarType dtype;
  bool autocast;
};

// A module that is called; sizes as in recurrent.h, LK directions of all layers.
struct Called {
  Layout layout;
  bool has_c;
  Precision precision;
  int64_t I, LK, R, H;
};

// The tensor of an object in that type, where it is plain and of no subclass.
std::optional<at::Tensor> plain_tensor(PyObject* object, Precision precision);

// The arguments of a call, where they are plain and of the right shapes, so that no check would have something to say. h and
// c may be None, which stands for zeros. What is unbatched becomes a batch of one row. lengths: None, or int64 [B] that have been
// checked; an input [N, I] is of packed rows then.
std::optional<CallArguments> call_arguments(const Called& module, PyObject* input, PyObject* h, PyObject* c,
                                            PyObject* lengths = Py_None);

// What the module returns, in the caller's layout: (y, h_n) or (y, (h_n, c_n)); a cell without y.
PyObject* call_results(const Called& module, bool unbatched, at::Tensor y, at::Tensor h_n, at::Tensor c_n);

}  // namespace rnnattn
