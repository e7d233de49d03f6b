#include "random_mask.h"

#include <cstring>

#include "../common/parallel.h"
#include "random.h"

namespace sslops::random_mask {
namespace {

constexpr int64_t kThreadTokens = 4096;

// A token's key in the high half, its place in the low one.
using Item = uint64_t;

Item item(int32_t key, int64_t j) {
  return static_cast<Item>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 | static_cast<uint32_t>(j);
}

// items: room for L, and for the rest of the last blocks.
void fill(const Noise& noise, int64_t row, Item* items) {
  if (noise.values) {
    for (int64_t j = 0; j < noise.length; ++j) items[j] = item(order(noise.values[row * noise.length + j]), j);
  } else {
    const uint64_t key = *noise.key;
    for (int64_t first = 0; first < noise.length; first += 4 * kBlocks) {
      uint32_t words[4 * kBlocks];
      draw_blocks(key, first_block(noise.length, row) + first / 4, RandomStream::random_mask, words);
      for (int k = 0; k < 4 * kBlocks; ++k) items[first + k] = item(static_cast<int32_t>(words[k]), first + k);
    }
  }
  for (int64_t j = 0; j < noise.num_prefix; ++j) items[j] = item(kFirst, j);
}

// By the high half, a byte at a time, equal ones in the order they come in. An even number of passes: the result is
// back where it was. Counting the smaller ones of each, L^2 comparisons, is no faster at L = 196 even with AVX-512.
void sort(Item* items, Item* other, int64_t n) {
  uint32_t starts[4][256] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int byte = 0; byte < 4; ++byte) ++starts[byte][items[i] >> (32 + 8 * byte) & 255];
  for (int byte = 0; byte < 4; ++byte) {
    uint32_t start = 0;
    for (uint32_t& slot : starts[byte]) {
      const uint32_t count = slot;
      slot = start;
      start += count;
    }
    for (int64_t i = 0; i < n; ++i) other[starts[byte][items[i] >> (32 + 8 * byte) & 255]++] = items[i];
    Item* const sorted = other;
    other = items;
    items = sorted;
  }
}

void draw_masks(const Noise& noise, int64_t batch, const Mask& out) {
  const int64_t length = noise.length, room = length + 4 * kBlocks;
  if (length == 0) return;
  parallel_for(batch, 1 + kThreadTokens / length, [&](int64_t begin, int64_t end) {
    Item* const items = new Item[2 * room];
    for (int64_t row = begin; row < end; ++row) {
      fill(noise, row, items);
      sort(items, items + room, length);
      for (int64_t rank = 0; rank < length; ++rank) place(out, length, row, static_cast<uint32_t>(items[rank]), rank);
    }
    delete[] items;
  });
}

void call(Tensor noise, int64_t num_prefix, Tensor ids_keep, Tensor ids_mask, Tensor mask, Tensor ids_restore) {
  draw_masks(noise_of(noise, num_prefix, ids_restore), ids_restore.sizes[0],
             mask_of(ids_keep, ids_mask, mask, ids_restore));
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{draw_masks, call};
}

}  // namespace sslops::random_mask
