// The CUDA kernel against the CPU's, bit for bit.
#include "cuda/random_token_corruption.cu"

#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/random_token_corruption.h"

namespace sslops::random_token_corruption {
namespace {

int run() {
  int wrong = 0;
  const uint64_t key = 0xfedcba9876543210;
  const Odds odds{uint64_t{1} << 31, 1717986918, 3006477107};
  for (int64_t n : {1, 255, 700}) {
    const std::unique_ptr<int64_t[]> ids(new int64_t[n]);
    const std::unique_ptr<bool[]> special(new bool[n]);
    for (int64_t k = 0; k < n; ++k) ids[k] = k * 3, special[k] = k % 7 == 0;
    for (const bool* each : {static_cast<const bool*>(nullptr), static_cast<const bool*>(special.get())}) {
      const Tokens tokens{ids.get(), each, n, -7, 30522};
      std::vector<int64_t> a(n), b(n), c(n), d(n);
      portable::table.corrupt(tokens, odds, &key, a.data(), b.data());
      cuda_corrupt(tokens, odds, &key, c.data(), d.data(), nullptr);
      if (a != c || b != d) {
        std::printf("differs: %ld tokens\n", static_cast<long>(n));
        ++wrong;
      }
    }
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::random_token_corruption

int main() { return sslops::random_token_corruption::run() != 0; }
