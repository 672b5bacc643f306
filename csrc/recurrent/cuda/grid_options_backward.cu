// The backward walk of the role `grid` for calls with options (ScanOptions), for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

BackwardKernel grid_options_backward(ScanCell cell, ScanNumber number) {
  return backward_kernel<GridExchange, true>(cell, number);
}

}  // namespace fastseq::cuda
