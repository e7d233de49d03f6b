#include "random_mask.h"

#include <cstring>

#include "../common/parallel.h"
#include "buffer.h"
#include "random.h"

namespace sslops::random_mask {
namespace {

constexpr int64_t kThreadTokens = 4096;

// A token's key in the high half, its place in the low one.
using Item = uint64_t;

Item item(int32_t key, int64_t j) {
  return static_cast<Item>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32 | static_cast<uint32_t>(j);
}

// The highest bit of each token's key says on which side of the squares it is.
void mark_blocks(const Noise& noise, int64_t row, Item* items) {
  constexpr Item kLater = Item{1} << 63;
  const Blocks& blocks = noise.blocks;
  const int64_t width = blocks.width, height = noise.length / width;
  for (int64_t j = 0; j < noise.length; ++j) items[j] = blocks.first ? items[j] | kLater : items[j] & ~kLater;
  for (int64_t i = 0; i < blocks.count; i += 4) {
    const Random4 random = draw_centers(noise, row, i / 4);
    for (int64_t k = 0; k < 4 && i + k < blocks.count; ++k) {
      const int64_t center = center_of(noise, random.word[k]);
      const int64_t top = center / width - blocks.size / 2, left = center % width - blocks.size / 2;
      const int64_t bottom = at_most(top + blocks.size, height), right = at_most(left + blocks.size, width);
      for (int64_t r = top < 0 ? 0 : top; r < bottom; ++r)
        for (int64_t c = left < 0 ? 0 : left; c < right; ++c) {
          Item& each = items[r * width + c];
          each = blocks.first ? each & ~kLater : each | kLater;
        }
    }
  }
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
    if (noise.blocks.count) mark_blocks(noise, row, items);
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
    Buffer<Item> items(2 * room);
    for (int64_t row = begin; row < end; ++row) {
      const Share share = share_of(noise, out, row);
      fill(noise, row, items);
      sort(items, items + room, share.tokens);
      for (int64_t rank = 0; rank < share.tokens; ++rank)
        place(out, share, length, row, static_cast<uint32_t>(items[rank]), rank);
      for (int64_t j = share.tokens; j < length; ++j) place(out, share, length, row, j, j);
    }
  });
}

void call(Tensor noise, int64_t num_prefix, Tensor lengths, Tensor counts, int64_t blocks, int64_t size, int64_t width,
          bool first, Tensor ids_keep, Tensor ids_mask, Tensor mask, Tensor ids_restore) {
  draw_masks(noise_of(noise, num_prefix, lengths, {blocks, size, width, first}, ids_restore), ids_restore.sizes[0],
             mask_of(counts, ids_keep, ids_mask, mask, ids_restore));
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{draw_masks, call};
}

}  // namespace sslops::random_mask
