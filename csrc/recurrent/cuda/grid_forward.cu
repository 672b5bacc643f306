// The forward walk of the role `grid`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel grid_forward(ScanCell cell, ScanDtype dtype) { return forward_kernel<GridExchange>(cell, dtype); }

}  // namespace fastseq::cuda
