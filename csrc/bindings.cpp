// The extension module rnnattn._C: what was built. Loading it registers the operators (ops.cpp).
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cpu/isa.h"
#include "cpu/workspace.h"
#include "layer_call.h"
#include "prepared_call.h"
#include "weight_watch.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

py::dict build_info() {
  py::list compiled;
  for (const char* isa : rnnattn::compiled_isas()) compiled.append(isa);
  py::dict info;
  info["compiler"] = RNNATTN_BUILD_COMPILER;
  info["flags"] = RNNATTN_BUILD_FLAGS;
  info["isa"] = rnnattn::kernel_table().isa;
  info["isas"] = compiled;
  info["cuda"] = split(RNNATTN_CUDA_ARCHS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rnnattn.";
  m.def("build_info", &build_info,
        "compiler, flags, isa (in use), isas (compiled) and cuda (architectures, empty without CUDA)");
  m.def("empty_cache", &rnnattn::empty_workspace_cache, "Frees the memory that is kept for the next call; its bytes.");
  rnnattn::bind_layer_call(m);
  rnnattn::bind_prepared_call(m);
  rnnattn::bind_weight_watch(m);
}
