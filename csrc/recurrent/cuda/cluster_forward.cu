// The forward walk of the role `cluster`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel cluster_forward(ScanCell cell, ScanNumber number) {
  return forward_kernel<ClusterExchange>(cell, number);
}

}  // namespace fastseq::cuda
