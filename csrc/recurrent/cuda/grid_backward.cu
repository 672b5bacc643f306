// The backward walk of the role `grid`, for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel grid_backward(ScanCell cell, ScanNumber number) { return backward_kernel<GridExchange>(cell, number); }

}  // namespace fastseq::cuda
