#include "parallel.h"

#include <sched.h>
#include <time.h>

#include "torch_symbol.h"

namespace sslops {
namespace {

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);

// ThreadSanitizer sees neither how torch's pool hands out work nor how it waits for its end: it is told.
struct Seen {
  RangeFn fn;
  void* ctx;

  static void run(int64_t begin, int64_t end, void* seen) {
    __tsan_acquire(seen);
    const Seen* const x = static_cast<Seen*>(seen);
    x->fn(begin, end, x->ctx);
    __tsan_release(seen);
  }
};
#endif

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
#ifdef __SANITIZE_THREAD__
    Seen seen{fn, ctx};
    __tsan_release(&seen);
    pool(begin, end, grain, Seen::run, &seen);
    __tsan_acquire(&seen);
#else
    pool(begin, end, grain, fn, ctx);
#endif
  } else {
    fn(begin, end, ctx);
  }
}

namespace {

constexpr double kPatience = 0.1;  // seconds
thread_local Call* current = nullptr;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

Call::Call(bool (*interrupt)()) : interrupt_(interrupt), asked_(now()), outer_(current) { current = this; }
Call::~Call() { current = outer_; }

bool give_up() {
  Call* const call = current;
  if (!call || call->interrupted_) return call;
  const double time = now();
  if (time - call->asked_ < kPatience) return false;
  call->asked_ = time;
  return call->interrupted_ = call->interrupt_();
}

void wait_for(const int32_t* progress, int32_t wanted) {
  for (int spins = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) < wanted;)
    if (++spins > 256) sched_yield();
}

void advance(int32_t* progress) { __atomic_fetch_add(progress, 1, __ATOMIC_RELEASE); }

}  // namespace sslops
