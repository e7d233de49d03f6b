// The smallest kernel: shows that the CUDA code in this module loads and runs on a device (`python -m sslops`).
#pragma once
#include <cstdint>

namespace sslops {

// out[k] = k, on the stream. Throws std::runtime_error with the reason where the launch fails or the driver is older
// than the CUDA that this module was built with, whose runtime is linked in.
void cuda_iota(int32_t* out, int64_t n, void* stream);

}  // namespace sslops
