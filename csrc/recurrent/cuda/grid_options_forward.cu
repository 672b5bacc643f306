// The forward walk of the role `grid` for calls with options (ScanOptions), for every cell and dtype.
#include "recurrent/cuda/resident.cuh"

namespace fastseq::cuda {

ForwardKernel grid_options_forward(ScanCell cell, ScanNumber number) {
  return forward_kernel<GridExchange, true>(cell, number);
}

}  // namespace fastseq::cuda
