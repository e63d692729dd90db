// The module _cpu. Through libtorch's stable ABI (target 2.11), so one binary serves every torch from 2.11 on; pybind11
// binds only the module's own facts. Each op registers itself in its own file.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "cpu/bind_levels.h"
#include "cpu/bind_pages.h"

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

STABLE_TORCH_LIBRARY(spcl_fast_cpu, m) { m.def("empty_gradient(Tensor like, int[] strides) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) { m.impl("empty_gradient", TORCH_BOX(&spcl::empty_gradient)); }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of spcl_fast for the CPU; importing this registers torch.ops.spcl_fast_cpu.";
  m.def("build_info", &build_info, "compiler, flags, cpu_levels, torch_target");
  m.def(
      "cpu_capability", [] { return std::string(spcl::kernels().name); }, "avx512, avx2 or baseline: the level in use");
}
