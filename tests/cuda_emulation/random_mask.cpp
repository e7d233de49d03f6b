// The CUDA kernel against the CPU's: more tokens than a tile, than a block; given noise with ties, NaN and zeros of
// both signs, and noise drawn by a key; padding and blocks.
#include "cuda/random_mask.cu"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "cpu/random_mask.h"

namespace sslops::random_mask {
namespace {

struct Buffers {
  int64_t batch, length, keep;
  // Exactly as many as there are, so that a sanitizer sees the first one past them.
  std::unique_ptr<int64_t[]> ids_keep{new int64_t[batch * keep]}, ids_mask{new int64_t[batch * (length - keep)]},
      ids_restore{new int64_t[batch * length]};
  std::unique_ptr<float[]> mask{new float[batch * length]};

  Mask out(const int64_t* counts) const {
    return {keep, ids_keep.get(), ids_mask.get(), ids_restore.get(), mask.get(), counts};
  }
  bool operator==(const Buffers& other) const {
    const auto same = [](const auto& a, const auto& b, int64_t n) { return std::equal(a.get(), a.get() + n, b.get()); };
    return same(ids_keep, other.ids_keep, batch * keep) && same(ids_mask, other.ids_mask, batch * (length - keep)) &&
           same(ids_restore, other.ids_restore, batch * length) && same(mask, other.mask, batch * length);
  }
};

bool differs(const Noise& noise, int64_t batch, int64_t keep, const int64_t* counts) {
  const Buffers on_cpu{batch, noise.length, keep}, on_cuda{batch, noise.length, keep};
  portable::table.draw(noise, batch, on_cpu.out(counts));
  cuda_draw(noise, batch, on_cuda.out(counts), nullptr);
  if (on_cpu == on_cuda) return false;
  std::printf("differs: %ld x %ld\n", static_cast<long>(batch), static_cast<long>(noise.length));
  return true;
}

int run() {
  std::mt19937 random(0);
  const float odd[] = {0.f, -0.f, NAN, -NAN, INFINITY, -INFINITY, 0.5f, -0.5f, 1e-40f, -1e-40f};
  int wrong = 0;
  for (int64_t length : {1, 7, 196, 300, 1030}) {
    const int64_t batch = length < 1000 ? 3 : 1;
    const std::unique_ptr<float[]> values(new float[batch * length]);
    for (int64_t k = 0; k < batch * length; ++k)
      values[k] = random() % 2 ? odd[random() % 10] : static_cast<float>(random()) / 4.3e9f;
    const uint64_t key = 0x0123456789abcdef;
    const int64_t prefix = length > 9 ? 2 : 0, keep = length / 4;
    const Blocks none{0, 1, 1, true};
    wrong += differs({values.get(), nullptr, length, prefix, nullptr, none}, batch, keep, nullptr);
    wrong += differs({nullptr, &key, length, prefix, nullptr, none}, batch, keep, nullptr);
    // Counts and lengths that nobody has looked at, too.
    const int64_t lengths[] = {length / 2, length + 9, -1}, counts[] = {keep / 2, keep + 9, keep};
    wrong += differs({values.get(), nullptr, length, 0, lengths, none}, batch, keep, counts);
    wrong += differs({nullptr, &key, length, 0, lengths, none}, batch, keep, nullptr);
    const int64_t width = length % 2 ? length : length / 2;
    for (const Blocks& blocks : {Blocks{6, 3, width, true}, {1, 4, width, false}})
      wrong += differs({nullptr, &key, length, 0, nullptr, blocks}, batch, keep, nullptr);
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::random_mask

int main() { return sslops::random_mask::run() != 0; }
