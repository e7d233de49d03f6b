// Loops that write to fresh memory: two threads that meet in a huge page that nobody has touched yet both clear it.
#pragma once
#include "../common/parallel.h"
#include "buffer.h"

namespace sslops {
namespace {

// body(k, state) for every k in [0, n), in no order, each thread with a state of its own from make(). It takes those of
// its own part one after another, and then what others have not begun.
template <typename Make, typename Body>
void parallel_parts(int64_t n, const Make& make, const Body& body) {
  Buffer<bool> begun(n);
  for (int64_t k = 0; k < n; ++k) begun[k] = false;
  int64_t left = n;
  parallel_for(n, 1, [&](int64_t first, int64_t) {
    if (__atomic_load_n(&left, __ATOMIC_RELAXED) <= 0) return;
    auto&& state = make();
    for (int64_t step = 0; step < n && __atomic_load_n(&left, __ATOMIC_RELAXED) > 0; ++step) {
      const int64_t k = first + step < n ? first + step : first + step - n;
      if (__atomic_exchange_n(begun + k, true, __ATOMIC_RELAXED)) continue;
      __atomic_fetch_sub(&left, 1, __ATOMIC_RELAXED);
      body(k, state);
      if (give_up()) __atomic_store_n(&left, 0, __ATOMIC_RELAXED);
    }
  });
}
template <typename Body>
void parallel_parts(int64_t n, const Body& body) {
  parallel_parts(n, [] { return 0; }, [&](int64_t k, int) { body(k); });
}

}  // namespace
}  // namespace sslops
