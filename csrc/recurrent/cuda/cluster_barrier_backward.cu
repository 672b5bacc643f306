// The backward walk of the role `cluster_barrier`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel cluster_barrier_backward(ScanCell cell, ScanDtype dtype) {
  return backward_kernel<ClusterBarrierExchange>(cell, dtype);
}

}  // namespace fastseq::cuda
