// rnnattn._C.call_layer: one call of a module without the dispatcher and autograd's way through Python, which
// take a single step as long as its products do.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnattn {

void bind_layer_call(pybind11::module_& m);

}  // namespace rnnattn
