// The forward walk of the role `cluster_barrier`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel cluster_barrier_forward(ScanCell cell, ScanDtype dtype) {
  return forward_kernel<ClusterBarrierExchange>(cell, dtype);
}

}  // namespace fastseq::cuda
