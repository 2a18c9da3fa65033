// rnnattn._C.WeightWatch: whether the parameters of a module are what they were; rnnattn/nn/weight_watch.py says of what it
// can be sure.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnattn {

void bind_weight_watch(pybind11::module_& m);

}  // namespace rnnattn
