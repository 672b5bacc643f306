// Loading this library registers the CPU implementations with torch.
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention/ops.h"
#include "core/arguments.h"
#include "core/isa.h"
#include "core/ops.h"

namespace fastseq {
namespace {

// Forces an instruction set of the CPU kernels ("": only asks) and returns the one in force.
std::string native_isa(StringHandle wanted) {
  const std::string name = take_text(wanted);
  STD_TORCH_CHECK(name.empty() || set_isa(name.c_str()), "native_isa: cannot use '", name,
                  "' here; expected 'auto' or one of: ", usable_isas());
  return isa_name(active_isa());
}

}  // namespace
}  // namespace fastseq

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("scan_forward.native", TORCH_BOX(&fastseq::scan_forward_cpu));
  m.impl("scan_backward.native", TORCH_BOX(&fastseq::scan_backward_cpu));
  m.impl("pack_weights", TORCH_BOX(&fastseq::pack_weights_cpu));
  m.impl("layers_forward.native", TORCH_BOX(&fastseq::layers_forward_cpu));
  m.impl("layers_backward.native", TORCH_BOX(&fastseq::layers_backward_cpu));
  m.impl("normed_forward.native", TORCH_BOX(&fastseq::normed_forward_cpu));
  m.impl("normed_backward.native", TORCH_BOX(&fastseq::normed_backward_cpu));
  m.impl("attention_forward.native", TORCH_BOX(&fastseq::attention_forward_cpu));
  m.impl("attention_backward.native", TORCH_BOX(&fastseq::attention_backward_cpu));
  m.impl("feed_forward", TORCH_BOX(&fastseq::feed_forward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&fastseq::native_isa));  // no tensor among its arguments
}
