// Loops on torch's own thread pool, found in the process at run time, so that nothing links to libtorch.
#pragma once
#include <cstdint>
#include <type_traits>

#include "tensor.h"

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

// body() on this thread, while the others of the pool stand by: its loops are for whoever is free, and end without
// those that are not. (At the end of a loop of the pool's own, a thread that lost its core to another process is waited
// for, though it has nothing to do.) Little work is for this thread alone, and so is what is much for a while after a
// call that the pool's threads, busy elsewhere, have held up for longer than their help was worth: `habit`, of the
// function, knows.
struct Habit {
  int32_t calls_alone, most_alone;  // that are still to be one thread's, and how many that were the last time
};
void run_together(bool small, Habit& habit, void (*body)(void* ctx), void* ctx);

bool is_small(const Tensor& x);
bool is_small(const Tensors& x);

// A function of several loops, to be run together.
template <auto kFunction, typename Function = decltype(kFunction)>
struct Together;
template <auto kFunction, typename Result, typename... Arguments>
struct Together<kFunction, Result (*)(Arguments...)> {
  template <typename Argument>
  static bool small(const Argument& x) {
    if constexpr (std::is_same_v<Argument, Tensor> || std::is_same_v<Argument, Tensors>)
      return is_small(x);
    else
      return true;
  }
  static Result run(Arguments... arguments) {
    std::conditional_t<std::is_void_v<Result>, char, Result> result{};
    auto body = [&] {
      if constexpr (std::is_void_v<Result>)
        kFunction(arguments...);
      else
        result = kFunction(arguments...);
    };
    static Habit habit;
    run_together((small(arguments) && ...), habit, [](void* run) { (*static_cast<decltype(body)*>(run))(); }, &body);
    if constexpr (!std::is_void_v<Result>) return result;
  }
};
template <auto kFunction>
constexpr auto together = Together<kFunction>::run;

// A call from Python, on the thread that made it. `interrupt` is asked now and then, on that thread, whether to give
// up: loops over tickets then end early, and what they were to write is not to be used.
class Call {
 public:
  explicit Call(bool (*interrupt)());
  Call(const Call&) = delete;
  ~Call();
  bool interrupted() const { return interrupted_; }

 private:
  friend bool give_up();
  bool (*interrupt_)();
  int64_t asked_;
  bool interrupted_ = false;
  Call* outer_;
};
bool give_up();  // of the current thread's call, if it has one

// body(k, state) for every k in [0, n), each thread with a state of its own from make(). A thread takes the next k when
// it is free: they begin in the order of k, so that one may wait for smaller ones.
template <typename Make, typename Body>
void parallel_tickets(int64_t n, const Make& make, const Body& body) {
  int64_t next = 0;
  parallel_for(n, 1, [&](int64_t, int64_t) {  // a part of the range for each thread: how many there are is all it says
    if (__atomic_load_n(&next, __ATOMIC_RELAXED) >= n) return;
    auto&& state = make();
    for (int64_t k; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) {
      body(k, state);
      if (give_up()) __atomic_store_n(&next, n, __ATOMIC_RELAXED);
    }
  });
}
template <typename Body>
void parallel_tickets(int64_t n, const Body& body) {
  parallel_tickets(n, [] { return 0; }, [&](int64_t k, int) { body(k); });
}

// Waits until *progress, which other threads advance, is at least `wanted`: for a moment awake, then asleep, so that a
// thread that shares its core with another process has it when its turn comes.
void wait_for(const int32_t* progress, int32_t wanted);
void advance(int32_t* progress);

}  // namespace sslops
