// Loops on torch's own thread pool, found in the process at run time, so that nothing links to libtorch.
#pragma once
#include <cstdint>

namespace sslops {

using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);

// Name of the pool in use: "torch" or "serial" (torch before 2.10 exports no entry point).
const char* parallel_backend();
void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx);

// body(begin, end) over disjoint ranges of [0, n), each at least `grain` long. Results must not depend on the split.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_range(
      0, n, grain, [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const Body*>(ctx))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace sslops
