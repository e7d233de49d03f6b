// How many of a row's slots are taken: numbers on the device, which nobody has looked at.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sslops {

// counts[row], but at least 0 and at most `highest`, which is also all there are without counts.
SSLOPS_HOST_DEVICE int64_t count_of(const int64_t* counts, int64_t row, int64_t highest) {
  const int64_t count = counts ? counts[row] : highest;
  return count < 0 ? 0 : count < highest ? count : highest;
}

}  // namespace sslops
