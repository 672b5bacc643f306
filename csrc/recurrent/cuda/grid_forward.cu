// The forward walk of the role `grid`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel grid_forward(ScanCell cell, ScanNumber number) { return forward_kernel<GridExchange>(cell, number); }

}  // namespace fastseq::cuda
