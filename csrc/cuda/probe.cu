#include <string>

#include "launch.cuh"
#include "probe.h"

namespace sslops {
namespace {

__global__ void iota(int32_t* out, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; k < n; k += stride) out[k] = static_cast<int32_t>(k);
}

void require_driver() {
#ifdef __CUDACC__
  int built = 0, driver = 0;  // 1000 x major + 10 x minor
  cudaRuntimeGetVersion(&built);
  cudaDriverGetVersion(&driver);
  if (driver / 1000 < built / 1000)
    throw std::runtime_error("built with CUDA " + std::to_string(built / 1000) + ", but the driver here is for CUDA " +
                             std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
                             " (CUDA 12 needs driver 525, CUDA 13 needs 580)");
#endif
}

}  // namespace

void cuda_iota(int32_t* out, int64_t n, void* stream) {
  require_driver();
  launch(iota, 64, 256, stream, out, n);
}

}  // namespace sslops
