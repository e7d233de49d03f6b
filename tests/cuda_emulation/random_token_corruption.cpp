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
  for (int64_t n : {1, 255, 700, 4900}) {
    const std::unique_ptr<int64_t[]> ids(new int64_t[n]), units(new int64_t[n]);
    const std::unique_ptr<bool[]> special(new bool[n]);
    for (int64_t row : {n, n % 7 ? n : n / 7}) {
      for (int64_t k = 0; k < n; ++k) {
        ids[k] = k * 3, special[k] = k % 7 == 0;
        units[k] = k % row ? units[k - 1] + (k % 3 == 0) : 0;
      }
      for (int options = 0; options < 16; ++options) {
        Tokens tokens{
            ids.get(), options & 1 ? special.get() : nullptr, options & 2 ? units.get() : nullptr, n, row, -7, {}, {}};
        tokens.odds.masked = 1717986918, tokens.odds.masked_or_random = 3006477107;
        tokens.odds.spans = options & 4 ? 5 : 1;
        for (int k = 0; k < 5; ++k) tokens.odds.begun[k] = (uint64_t{1} << 29) / (k + 1);
        tokens.specials.runs = options & 8 ? 2 : 0, tokens.specials.drawn = options & 8 ? 30522 - 61 : 30522;
        tokens.specials.first[0] = 0, tokens.specials.end[0] = 1;
        tokens.specials.first[1] = 90, tokens.specials.end[1] = 150;
        std::vector<int64_t> a(n), b(n), c(n), d(n);
        portable::table.corrupt(tokens, &key, a.data(), b.data());
        cuda_corrupt(tokens, &key, c.data(), d.data(), nullptr);
        if (a != c || b != d) {
          std::printf("differs: %ld tokens, options %d\n", static_cast<long>(n), options);
          ++wrong;
        }
      }
    }
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::random_token_corruption

int main() { return sslops::random_token_corruption::run() != 0; }
