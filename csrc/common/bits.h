// Floating-point numbers as their bits, and float32 to bfloat16.
#pragma once
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace sslops {

SSLOPS_HOST_DEVICE uint32_t bits(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}
SSLOPS_HOST_DEVICE float from_bits(uint32_t b) {
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

SSLOPS_HOST_DEVICE uint64_t bits(double x) {
  uint64_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}
SSLOPS_HOST_DEVICE double from_bits(uint64_t b) {
  double x;
  memcpy(&x, &b, sizeof x);
  return x;
}

SSLOPS_HOST_DEVICE uint16_t to_bf16(float x) {
  const uint32_t b = bits(x), rounded = b + 0x7fffu + (b >> 16 & 1u);
  return static_cast<uint16_t>((x == x ? rounded : b | 0x400000u) >> 16);
}

}  // namespace sslops
