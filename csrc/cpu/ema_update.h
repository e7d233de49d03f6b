// The momentum update on the CPU: one pass through memory, chunks of all tensors spread over the threads.
#pragma once
#include <cstdint>

#include "../common/ema_pairs.h"
#include "../common/isa.h"

namespace sslops::ema_update {

struct Table {
  // seed: half-precision targets are rounded stochastically with it, or to nearest if it is null.
  void (*update)(const Work& work, double momentum, const uint64_t* seed);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::ema_update
