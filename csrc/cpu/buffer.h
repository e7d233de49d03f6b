// Scratch memory of the kernels: not initialised, freed with its scope.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "../common/huge_pages.h"

namespace sslops {
namespace {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    data_ = static_cast<T*>(aligned_alloc(kLine, bytes ? bytes : kLine));
    if (!data_) abort();  // as a stack overflow would: there is no exception to cross the thread pool with
    advise_huge_pages(data_, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  operator T*() { return data_; }
  operator const T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace sslops
