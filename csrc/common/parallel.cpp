#include "parallel.h"

#include "torch_symbol.h"

namespace sslops {
namespace {

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, RangeFn, void*);

TorchParallelFor torch_pool() {
  static const TorchParallelFor found = reinterpret_cast<TorchParallelFor>(torch_symbol("torch_parallel_for"));
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
