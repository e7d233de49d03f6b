// Large scratch on huge pages: its first touch costs a sixth.
#pragma once
#include <cstdint>

namespace sslops {

// Asks for huge pages in [address, address + bytes); a hint that may come to nothing.
void advise_huge_pages(void* address, int64_t bytes);

}  // namespace sslops
