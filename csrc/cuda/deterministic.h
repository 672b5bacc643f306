// torch.are_deterministic_algorithms_enabled() for C++: torch's stable ABI has no such function, so Python is asked.
#pragma once
#include <Python.h>

namespace fastseq::cuda {

// False in a program that has no Python, or has not imported torch there. Takes the interpreter's lock.
inline bool torch_is_deterministic() {
  if (!Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* modules = PyImport_GetModuleDict();  // borrowed, as is what is found in it
  PyObject* torch = PyDict_GetItemString(modules, "torch");
  PyObject* answer =
      torch == nullptr ? nullptr : PyObject_CallMethod(torch, "are_deterministic_algorithms_enabled", nullptr);
  const bool deterministic = answer != nullptr && PyObject_IsTrue(answer) == 1;
  Py_XDECREF(answer);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  PyGILState_Release(state);
  return deterministic;
}

}  // namespace fastseq::cuda
