#include "parallel.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

namespace {

void pool_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
#ifdef __SANITIZE_THREAD__
  Seen seen{fn, ctx};
  __tsan_release(&seen);
  const int32_t failed = torch_pool()(begin, end, grain, Seen::run, &seen);
  __tsan_acquire(&seen);
#else
  const int32_t failed = torch_pool()(begin, end, grain, fn, ctx);
#endif
  if (failed) abort();  // nothing of ours throws: threads could not be had, and parts of the range were not run
}

// Threads that stand by, and the loop that is theirs.
struct Team {
  void (*body)(void* ctx);
  void* body_ctx;
  Habit& habit;
  int64_t began;
  int64_t threads = 1;
  RangeFn fn = nullptr;
  void* ctx = nullptr;
  int64_t begin = 0, end = 0, part = 0;
  uint64_t parts = 0;  // how many, << 32, and the next one that nobody has
  int32_t loops = 0;   // that there were, and one for the end
  int32_t done = 0;    // parts, of all loops
  int64_t worked = 0;  // nanoseconds of all of them
  int32_t gone = 0;    // threads that no longer stand by
  bool over = false;
};
thread_local Team* team = nullptr;  // of the thread that runs the body
thread_local bool alone = false;

// Takes parts of the loop as long as there are any. A part that was taken holds the loop open: what is read after that
// is of the same one.
void work(Team& t) {
  for (uint64_t seen = __atomic_load_n(&t.parts, __ATOMIC_ACQUIRE);;) {
    const uint64_t next = seen & 0xffffffff;
    if (next >= seen >> 32) return;
    if (!__atomic_compare_exchange_n(&t.parts, &seen, seen + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) continue;
    const int64_t begin = t.begin + static_cast<int64_t>(next) * t.part;
    t.fn(begin, t.end - begin < t.part ? t.end : begin + t.part, t.ctx);
    advance(&t.done);
    seen = __atomic_load_n(&t.parts, __ATOMIC_ACQUIRE);
  }
}

void stand_by(Team& t) {
  for (int32_t seen = 0;;) {
    wait_for(&t.loops, seen + 1);
    seen = __atomic_load_n(&t.loops, __ATOMIC_ACQUIRE);
    if (__atomic_load_n(&t.over, __ATOMIC_ACQUIRE)) return;
    work(t);
  }
}

void lead(Team& t, int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  const int64_t most = (end - begin + grain - 1) / grain, parts = most < t.threads ? most : t.threads;
  t.fn = fn, t.ctx = ctx, t.begin = begin, t.end = end, t.part = (end - begin + parts - 1) / parts;
  const int64_t filled = (end - begin + t.part - 1) / t.part;
  const int32_t wanted = __atomic_load_n(&t.done, __ATOMIC_RELAXED) + static_cast<int32_t>(filled);
  __atomic_store_n(&t.parts, static_cast<uint64_t>(filled) << 32, __ATOMIC_RELEASE);
  advance(&t.loops);
  team = nullptr;  // loops in a loop are its thread's own
  work(t);
  team = &t;
  wait_for(&t.done, wanted);
}

int64_t now(clockid_t clock = CLOCK_MONOTONIC) {  // nanoseconds
  timespec t;
  clock_gettime(clock, &t);
  return 1000000000 * static_cast<int64_t>(t.tv_sec) + t.tv_nsec;
}

thread_local int64_t spun = 0;  // by this thread, nanoseconds

// Nanoseconds that this thread has had its core, and used it
int64_t worked() { return now(CLOCK_THREAD_CPUTIME_ID) - spun; }

bool is_alone(Habit& habit) {
  const int32_t left = __atomic_load_n(&habit.calls_alone, __ATOMIC_RELAXED);
  if (left > 0) __atomic_store_n(&habit.calls_alone, left - 1, __ATOMIC_RELAXED);
  return left > 0;
}

// After a call that took longer than all its threads together worked, one of them is faster alone: the others are asked
// again after 1, 3, 7 .. 63 calls.
void judge(const Team& t) {
  const bool late = now() - t.began > __atomic_load_n(&t.worked, __ATOMIC_ACQUIRE);
  const int32_t before = __atomic_load_n(&t.habit.most_alone, __ATOMIC_RELAXED),
                next = late ? (2 * before + 1) & 63 : 0;
  __atomic_store_n(&t.habit.most_alone, next, __ATOMIC_RELAXED);
  __atomic_store_n(&t.habit.calls_alone, next, __ATOMIC_RELAXED);
}

constexpr int64_t kMany = 1 << 20;  // more than a pool has threads

}  // namespace

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  if (begin >= end) return;
  if (end - begin <= grain || alone || !torch_pool()) return fn(begin, end, ctx);
  if (team) return lead(*team, begin, end, grain, fn, ctx);
  pool_range(begin, end, grain, fn, ctx);
}

// A loss of N rows has at most N x N logits.
bool is_small(const Tensor& x) {
  constexpr int64_t kSmall = 8192;
  return x.numel <= kSmall && (x.dim == 0 || x.sizes[0] * x.sizes[0] <= kSmall);
}
bool is_small(const Tensors& x) {
  for (int64_t k = 0; k < x.count; ++k)
    if (!is_small(x.data[k])) return false;
  return true;
}

void run_together(bool small, Habit& habit, void (*body)(void* ctx), void* ctx) {
  if (small || !torch_pool() || is_alone(habit)) {
    alone = true;
    body(ctx);
    alone = false;
    return;
  }
  Team t{body, ctx, habit, now()};
  const RangeFn each = [](int64_t begin, int64_t end, void* ctx) {
    Team& t = *static_cast<Team*>(ctx);
    const int64_t before = worked();
    if (begin) {  // the first part is that of the thread that asks
      stand_by(t);
      __atomic_fetch_add(&t.worked, worked() - before, __ATOMIC_RELAXED);
      return advance(&t.gone);
    }
    t.threads = (kMany + end - 1) / end;
    if (t.threads > 1) team = &t;
    t.body(t.body_ctx);
    team = nullptr;
    __atomic_store_n(&t.over, true, __ATOMIC_RELEASE);
    advance(&t.loops);
    // The pool would wait for them awake, on the core that one of them may need.
    wait_for(&t.gone, static_cast<int32_t>(t.threads - 1));
    __atomic_fetch_add(&t.worked, worked() - before, __ATOMIC_RELAXED);
    if (t.threads > 1) judge(t);
  };
  pool_range(0, kMany, 1, each, &t);
}

namespace {

constexpr int64_t kPatience = 100000000;  // nanoseconds
thread_local Call* current = nullptr;

}  // namespace

Call::Call(bool (*interrupt)()) : interrupt_(interrupt), asked_(now()), outer_(current) { current = this; }
Call::~Call() { current = outer_; }

bool give_up() {
  Call* const call = current;
  if (!call || call->interrupted_) return call;
  const int64_t time = now();
  if (time - call->asked_ < kPatience) return false;
  call->asked_ = time;
  return call->interrupted_ = call->interrupt_();
}

namespace {

int sleepers = 0;  // threads that wait_for() may have put to sleep

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while(const int32_t* word, int32_t value) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  sched_yield();
#endif
}

void wake(const int32_t* word) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

}  // namespace

void wait_for(const int32_t* progress, int32_t wanted) {
  constexpr int kSpins = 10000;  // some 200 microseconds
  const auto there = [&] { return __atomic_load_n(progress, __ATOMIC_ACQUIRE) >= wanted; };
  if (there()) return;
  const int64_t before = now(CLOCK_THREAD_CPUTIME_ID);
  for (int spins = 0; !there() && spins < kSpins; ++spins) relax();
  spun += now(CLOCK_THREAD_CPUTIME_ID) - before;
  if (there()) return;
  __atomic_fetch_add(&sleepers, 1, __ATOMIC_SEQ_CST);
  for (int32_t seen; (seen = __atomic_load_n(progress, __ATOMIC_SEQ_CST)) < wanted;) sleep_while(progress, seen);
  __atomic_fetch_sub(&sleepers, 1, __ATOMIC_SEQ_CST);
}

// Either this sees the sleeper, or the sleeper this progress.
void advance(int32_t* progress) {
  __atomic_fetch_add(progress, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake(progress);
}

}  // namespace sslops
