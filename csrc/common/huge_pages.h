// Large scratch on huge pages: its first touch costs a sixth.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "tensor.h"

namespace sslops {

// Asks for huge pages in [address, address + bytes); a hint that may come to nothing.
void advise_huge_pages(void* address, int64_t bytes);

// For memory that nothing has touched yet. Smaller ones come from memory that malloc has kept, or cost little.
SSLOPS_HOST void on_huge_pages(const Tensor& x) {
  if (const int64_t bytes = x.numel * x.item_size; bytes >= 4 << 20) advise_huge_pages(x.data, bytes);
}

}  // namespace sslops
