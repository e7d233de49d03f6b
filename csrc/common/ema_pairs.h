// Which memory a momentum update reads and writes: checked once, kept between steps, read anew when a tensor has moved.
#pragma once
#include <cstdint>
#include <memory>
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

// What a kernel gets.
struct Work {
  std::vector<Row> rows;
  int64_t chunks = 0, elements = 0;
};

class Pairs {
 public:
  // Tensors as the addresses of their implementations (`_cdata`), lists of one length; shadows may be empty. If
  // `copied`, sources replace targets, and any dtype will do that both have. Cheap where nothing has changed since the
  // last time.
  Problem read(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& sources,
               const std::vector<uintptr_t>& shadows, bool copied);

  // Another object after each change: kernels that run in other threads keep theirs.
  std::shared_ptr<Work> work = std::make_shared<Work>();
  std::vector<int64_t> updated;  // the pairs that have elements, those that come twice once
  // Those whose elements are not in the same order in memory, or not dense. They are not in `work`: it has to be read
  // from lists that hold contiguous copies in their places.
  std::vector<int64_t> strided;
  // Those that could be views with the negation or conjugation still to be done: complex ones, and of the dense ones
  // those of one element (z.conj().imag).
  std::vector<int64_t> lazy;

 private:
  std::vector<int64_t> layout_, now_;
};

}  // namespace sslops::ema_update
