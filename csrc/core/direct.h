// Inference called straight from Python, past torch's operator dispatch.
#pragma once
#include <Python.h>

namespace fastseq {

extern PyMethodDef direct_methods[];  // of the module fastseq._native

}  // namespace fastseq
