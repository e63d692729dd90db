// The module _C. Through libtorch's stable ABI (target 2.11), so one binary serves every torch from 2.11 on; pybind11 binds only the
// module's own facts. Each op registers itself in its own file.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "ops/levels.h"
#include "ops/pages.h"

#if !defined(SPCL_CXX_FLAGS)
#define SPCL_CXX_FLAGS ""
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = SPCL_CXX_FLAGS;
  info["cpu_levels"] = spcl::level_names();
  info["torch_target"] = "2.11";
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(spcl_fast_native, m) { m.def("empty_gradient(Tensor like, int[] strides) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_native, CPU, m) { m.impl("empty_gradient", TORCH_BOX(&spcl::empty_gradient)); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of spcl_fast; importing this registers torch.ops.spcl_fast_native.";
  m.def("build_info", &build_info, "compiler, flags, cpu_levels, torch_target");
  m.def("cpu_capability", [] { return std::string(spcl::kernels().name); }, "avx512, avx2 or baseline: the level in use");
}
