// Which memory a momentum update reads and writes: checked once, kept between steps, read anew when a tensor has moved.
#pragma once
#include <cstdint>
#include <vector>

#include "ema_update.h"
#include "tensor.h"

namespace sslops::ema_update {

enum List : int { kTargets, kSources, kShadows };

// What is wrong with tensor `index` of `list`; overlaps name the other tensor as well.
struct Problem {
  const char* what = "";  // empty: nothing
  int list = 0;
  int64_t index = 0;
  int other_list = 0;
  int64_t other_index = 0;
};

class Pairs {
 public:
  // Tensors as the addresses of their implementations (`_cdata`), lists of one length; shadows may be empty. Cheap
  // where nothing has changed since the last time. Chunks count from first_chunk: it sets which random numbers are
  // drawn.
  Problem read(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
               const std::vector<uintptr_t>& shadows, int64_t first_chunk);

  std::vector<Row> rows;
  // Pairs whose elements are not in the same order in memory, or not dense: to be updated through contiguous copies.
  std::vector<int64_t> strided;
  int64_t first_chunk = 0, chunks = 0, elements = 0;
  int64_t version = 0;  // counts the changes

 private:
  std::vector<int64_t> layout_;
};

}  // namespace sslops::ema_update
