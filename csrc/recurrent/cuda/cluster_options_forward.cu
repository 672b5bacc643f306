// The forward walk of the role `cluster` for calls with options (ScanOptions), for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel cluster_options_forward(ScanCell cell, ScanNumber number) {
  return forward_kernel<ClusterExchange, true>(cell, number);
}

}  // namespace fastseq::cuda
