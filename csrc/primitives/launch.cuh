// Launching kernels, and what the device allows: host code.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "primitives/types.cuh"

// A kernel of at most `threads` threads a block, of which at least `blocks` fit on a multiprocessor.
#define FASTSEQ_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTSEQ_DEVICE __device__ __forceinline__
// Before a kernel's parameter that is read in place, as tensor maps must be: `FASTSEQ_IN_PLACE TensorMap map`.
#define FASTSEQ_IN_PLACE const __grid_constant__

namespace fastseq::cuda {

using Stream = cudaStream_t;

inline const char* error_text(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

namespace detail {

// A cudaLaunchConfig_t with its attributes, for a kernel allowed all the shared memory that the shape asks for.
struct Config {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  cudaError_t status = cudaSuccess;

  Config(const void* kernel, const Launch& shape, Stream stream) {
    config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = stream;
    config.attrs = attributes;
    if (shape.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
    }
    if (shape.cooperative) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (shape.shared > 48 * 1024)
      status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
    if (status == cudaSuccess && shape.cluster > 8)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
};

}  // namespace detail

// Starts a kernel; nullptr, or why it could not start.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Launch& shape, Stream stream, A&&... arguments) {
  detail::Config config(reinterpret_cast<const void*>(kernel), shape, stream);
  if (config.status == cudaSuccess)
    config.status = cudaLaunchKernelEx(&config.config, kernel, P(std::forward<A>(arguments))...);
  if (config.status != cudaSuccess) cudaGetLastError();  // so that the next caller does not meet it
  return error_text(config.status);
}

// How many clusters of this shape the device holds at once; 0 where none fits.
template <class... P>
int resident_clusters(void (*kernel)(P...), const Launch& shape) {
  detail::Config config(reinterpret_cast<const void*>(kernel), shape, nullptr);
  int count = 0;
  if (config.status == cudaSuccess)
    config.status = cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &config.config);
  if (config.status != cudaSuccess) cudaGetLastError();
  return config.status == cudaSuccess ? count : 0;
}

// How many blocks of this shape one multiprocessor holds at once.
template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), const Launch& shape) {
  detail::Config config(reinterpret_cast<const void*>(kernel), shape, nullptr);
  int count = 0;
  if (config.status == cudaSuccess)
    config.status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &count, reinterpret_cast<const void*>(kernel), static_cast<int>(shape.threads), shape.shared);
  if (config.status != cudaSuccess) cudaGetLastError();
  return config.status == cudaSuccess ? count : 0;
}

// The limits of the current device; nullptr, or why they could not be read.
inline const char* device_limits(DeviceLimits& limits) {
  int device = 0, shared = 0, per_multiprocessor = 0, cooperative = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(limits.major, cudaDevAttrComputeCapabilityMajor);
  read(limits.minor, cudaDevAttrComputeCapabilityMinor);
  read(limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(cooperative, cudaDevAttrCooperativeLaunch);
  limits.shared_per_block = static_cast<size_t>(shared);
  limits.shared_per_multiprocessor = static_cast<size_t>(per_multiprocessor);
  limits.cooperative = cooperative != 0;
  return error_text(status);
}

// Sets bytes of device memory to zero in stream order; nullptr or the error.
inline const char* set_zero(void* target, size_t bytes, Stream stream) {
  return error_text(cudaMemsetAsync(target, 0, bytes, stream));
}

}  // namespace fastseq::cuda
