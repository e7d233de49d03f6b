// Random masks by a stable sort of each row's noise.
#pragma once
#include "../common/isa.h"
#include "../common/random_mask.h"

namespace sslops::random_mask {

struct Table {
  void (*draw)(const Noise& noise, int64_t batch, const Mask& out);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::random_mask
