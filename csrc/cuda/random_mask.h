// Random masks on a CUDA device: one launch.
#pragma once
#include "../common/random_mask.h"

namespace sslops::random_mask {

// Throws std::runtime_error with CUDA's reason where the launch fails.
void cuda_draw(const Noise& noise, int64_t batch, const Mask& out, void* stream);

}  // namespace sslops::random_mask
