// The forward walk of the role `cluster_barrier`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel cluster_barrier_forward(ScanCell cell, ScanNumber number) {
  return forward_kernel<ClusterBarrierExchange>(cell, number);
}

}  // namespace fastseq::cuda
