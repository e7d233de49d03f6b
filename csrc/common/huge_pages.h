// Large scratch on huge pages: its first touch costs a sixth.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "tensor.h"

namespace sslops {

constexpr int64_t kWorthHugePages = 4 << 20;  // bytes: fewer come from memory that malloc has kept, or cost little

// Asks for huge pages in [address, address + bytes), which nothing has touched yet; a hint that may come to nothing.
void advise_huge_pages(void* address, int64_t bytes);

SSLOPS_HOST void on_huge_pages(const Tensor& x) { advise_huge_pages(x.data, x.numel * x.item_size); }

}  // namespace sslops
