// The backward walk of the role `cluster`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel cluster_backward(ScanCell cell, ScanDtype dtype) { return backward_kernel<ClusterExchange>(cell, dtype); }

}  // namespace fastseq::cuda
