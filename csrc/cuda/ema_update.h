// The momentum update on a CUDA device: one launch for all tensors, a block for each chunk. The table of the tensors is
// uploaded before, once for as long as none moves.
#pragma once
#include <cstdint>

#include "../common/ema_pairs.h"

namespace sslops::ema_update {

// A number, or where to find it on the device: float32, or float64 if is_double.
struct Momentum {
  double value;
  const void* device;
  bool is_double;
};

// A number, or where to find it on the device; without `stochastic`, half-precision targets are rounded to nearest.
struct Seed {
  bool stochastic;
  uint64_t value;
  const uint64_t* device;
};

// The rows to device memory, on the stream. They travel as kernel arguments: nothing on the host has to outlive the
// call, and it can be captured in a graph.
void cuda_upload(const Work& work, Row* device_rows, void* stream);

// Throws std::runtime_error with CUDA's reason where a launch fails.
void cuda_update(const Work& work, const Row* device_rows, Momentum momentum, Seed seed, void* stream);

}  // namespace sslops::ema_update
