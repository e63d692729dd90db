// The module spcl_fast._cuda: importing it registers torch.ops.spcl_fast_cuda (the bind_<op>.cpp files); it has no
// functions of its own.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(SPCL_CUDA_ARCHS)
#define SPCL_CUDA_ARCHS ""
#endif
#if !defined(SPCL_CUDA_TOOLKIT)
#define SPCL_CUDA_TOOLKIT ""
#endif

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of spcl_fast", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyModule_AddStringConstant(module, "archs", SPCL_CUDA_ARCHS);
  PyModule_AddStringConstant(module, "toolkit", SPCL_CUDA_TOOLKIT);
  return module;
}
