// The operators' schemas, for programs without Python: libfastseq.so alone has them. In Python fastseq.ops defines them, and
// the build makes schemas.inc of the same text (fastseq/ops/schemas.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
#include "schemas.inc"
}
