// The Python module fastseq._native, whose functions are the fast path past torch's dispatcher (direct.cpp).
#include <Python.h>

namespace fastseq {
extern PyMethodDef direct_methods[];  // recurrent/direct.cpp
}

extern "C" PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Registers fastseq's CPU kernels.", -1,
                                   fastseq::direct_methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
