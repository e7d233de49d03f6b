#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sslops {

void advise_huge_pages(void* address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kWorthHugePages) return;
  constexpr uintptr_t kPage = 1 << 16;  // a multiple of any page size in use: madvise wants whole pages
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace sslops
