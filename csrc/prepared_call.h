// rnnattn._C.PreparedCall: one call of a prepared module without the dispatcher, which takes a small layer's
// single step as long as its products do.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnattn {

void bind_prepared_call(pybind11::module_& m);

}  // namespace rnnattn
