// The CUDA kernel against the CPU's: no targets and many, contexts that are drawn again until nothing is taken out of
// them, blocks of one token and of all.
#include "cuda/multi_block_mask.cu"

#include <cstdio>
#include <cstring>
#include <memory>

#include "cpu/multi_block_mask.h"

namespace sslops::multi_block_mask {
namespace {

struct Buffers {
  int64_t batch, targets, most;
  // Exactly as many as there are, so that a sanitizer sees the first one past them.
  std::unique_ptr<int64_t[]> ids_context{new int64_t[batch * most]}, context_counts{new int64_t[batch]},
      ids_targets{new int64_t[targets * batch * most]}, target_counts{new int64_t[targets * batch]};

  Masks out() const {
    return {batch, most, most, ids_context.get(), context_counts.get(), ids_targets.get(), target_counts.get()};
  }
  bool operator==(const Buffers& other) const {
    const auto same = [](const auto& a, const auto& b, int64_t n) {
      return std::memcmp(a.get(), b.get(), n * sizeof a[0]) == 0;
    };
    return same(ids_context, other.ids_context, batch * most) && same(context_counts, other.context_counts, batch) &&
           same(ids_targets, other.ids_targets, targets * batch * most) &&
           same(target_counts, other.target_counts, targets * batch);
  }
};

int run() {
  const uint64_t key = 0x0123456789abcdef;
  const Range some{kOne / 8, kOne / 8}, most{kOne / 2, kOne / 2}, square{kOne, 0}, any{kOne / 64, 63 * kOne};
  int wrong = 0;
  for (const Grid& grid : {Grid{14, 14, 4, 10, some, square, most},
                           {3, 11, 32, 5, most, any, most},
                           {7, 5, 0, 35, some, any, some},
                           {1, 1, 2, 1, most, any, most}})
    for (int64_t batch : {0, 3}) {
      const Buffers on_cpu{batch, grid.targets, grid.height * grid.width};
      const Buffers on_cuda{batch, grid.targets, grid.height * grid.width};
      portable::table.draw(grid, &key, on_cpu.out());
      cuda_draw(grid, &key, on_cuda.out(), nullptr);
      if (on_cpu == on_cuda) continue;
      std::printf("differs: %ld x %ld\n", static_cast<long>(grid.height), static_cast<long>(grid.width));
      ++wrong;
    }
  return wrong;
}

}  // namespace
}  // namespace sslops::multi_block_mask

int main() { return sslops::multi_block_mask::run() != 0; }
