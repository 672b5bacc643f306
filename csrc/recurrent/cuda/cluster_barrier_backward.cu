// The backward walk of the role `cluster_barrier`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel cluster_barrier_backward(ScanCell cell, ScanNumber number) {
  return backward_kernel<ClusterBarrierExchange>(cell, number);
}

}  // namespace fastseq::cuda
