// A sum over rows in double, whose order does not depend on the threads.
#pragma once
#include <cstdint>

#include "../common/parallel.h"

namespace sslops {
namespace {

template <typename Row>
double sum_rows(int64_t rows, Row&& row) {
  constexpr int64_t kBatch = 1024;
  double part[kBatch], total = 0.;
  for (int64_t first = 0; first < rows; first += kBatch) {
    const int64_t batch = rows - first < kBatch ? rows - first : kBatch;
    parallel_for(batch, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part[i] = row(first + i);
    });
    for (int64_t i = 0; i < batch; ++i) total += part[i];
  }
  return total;
}

}  // namespace
}  // namespace sslops
