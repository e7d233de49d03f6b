// The one way a kernel is launched: <<<>>> on the given stream under nvcc. Without nvcc, tests/cuda_emulation runs the
// same sources on CPU threads, where sanitizers see them.
#pragma once
#include <cstdint>
#include <stdexcept>

#ifndef __CUDACC__
#include "cuda_emulation.h"
#endif

namespace sslops {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned block, void* stream, Arguments... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error("too many blocks for one launch");
  const unsigned grid = static_cast<unsigned>(blocks);
#ifdef __CUDACC__
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(error));
#else
  static_cast<void>(stream);
  cuda_emulation::run(grid, block, [=] { kernel(arguments...); });
#endif
}

}  // namespace sslops
