// The backward walk of the role `cluster`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel cluster_backward(ScanCell cell, ScanNumber number) {
  return backward_kernel<ClusterExchange>(cell, number);
}

}  // namespace fastseq::cuda
