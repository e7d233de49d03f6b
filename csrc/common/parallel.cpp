#include "parallel.h"

#include <dlfcn.h>

namespace sslops {
namespace {

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, RangeFn, void*);

TorchParallelFor find_torch() {
#ifdef __APPLE__
  void* lib = dlopen("libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
  void* lib = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
  return lib ? reinterpret_cast<TorchParallelFor>(dlsym(lib, "torch_parallel_for")) : nullptr;
}

// Looked up on first use: `import sslops` imports torch before the core.
TorchParallelFor torch_pool() {
  static const TorchParallelFor found = find_torch();
  return found;
}

}  // namespace

const char* parallel_backend() { return torch_pool() ? "torch" : "serial"; }

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  if (begin >= end) return;
  if (TorchParallelFor pool = torch_pool(); pool && end - begin > grain) {
    pool(begin, end, grain, fn, ctx);
  } else {
    fn(begin, end, ctx);
  }
}

}  // namespace sslops
