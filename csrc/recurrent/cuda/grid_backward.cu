// The backward walk of the role `grid`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel grid_backward(ScanCell cell, ScanDtype dtype) { return backward_kernel<GridExchange>(cell, dtype); }

}  // namespace fastseq::cuda
