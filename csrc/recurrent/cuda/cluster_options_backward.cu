// The backward walk of the role `cluster` for calls with options (ScanOptions), for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel cluster_options_backward(ScanCell cell, ScanNumber number) {
  return backward_kernel<ClusterExchange, true>(cell, number);
}

}  // namespace fastseq::cuda
