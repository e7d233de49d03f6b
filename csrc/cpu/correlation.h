// A^T B of views [N, D] in tiles, and the products that go back from them.
#pragma once
#include "strips.h"

namespace sslops {
namespace {

constexpr int64_t kSide = 128;  // of a tile
constexpr int64_t kDeep = 256;  // rows at a time: what a tile meets of them is in the second-level cache

// [N, D] in float32, rows ld apart, zeros after them
struct Matrix {
  const int64_t n, d, ld;
  Buffer<float> data;

  Matrix(int64_t n, int64_t d) : n(n), d(d), ld(stride_of(d)), data(n * ld) {}
  // A view that is centred or normalised, as an operand; each(strip's first column, width, strip) sees it pass.
  explicit Matrix(const View& v) : Matrix(v, [](int64_t, int64_t, const Strip&) {}) {}
  template <typename Each>
  Matrix(const View& v, const Each& each) : Matrix(v.n, v.d) {
    for_each_strip(
        d, [&] { return Strip(v); },
        [&](int64_t first, int64_t width, Strip& strip) {
          strip.fill(v, first, width);
          each(first, width, strip);
          take(strip, first, width);
        });
  }

  void take(const Strip& strip, int64_t first, int64_t width) {
    const int64_t end = first + width == d ? ld - first : width;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < end; j += kLanes)
        store(data + i * ld + first + j, j < kStrip ? strip.operand(i, j) : F{});
  }

  void copy_to(float* out) const {  // [N, D]
    parallel_for(n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(out + i * d, data + i * ld, d * sizeof(float));
    });
  }
};

// s [p, q] = a[:, i .. i + p)^T b[:, j .. j + q), columns of s up to whole vectors
inline void multiply(const Matrix& a, int64_t i, int64_t p, const Matrix& b, int64_t j, int64_t q, float* s,
                     int64_t ld) {
  for (int64_t k = 0; k < a.n; k += kDeep)
    gemm(p, q, a.n - k < kDeep ? a.n - k : kDeep, {a.data + k * a.ld + i, 1, a.ld},
         {b.data + k * b.ld + j, b.ld, kPanel}, s, ld, k > 0);
}

// out[:, j .. j + q) (+)= a[:, i .. i + p) w, w [p, q]
inline void multiply_back(const Matrix& a, int64_t i, int64_t p, const float* w, int64_t ld, int64_t q, Matrix& out,
                          int64_t j, bool add) {
  for (int64_t k = 0; k < a.n; k += kDeep)
    gemm(a.n - k < kDeep ? a.n - k : kDeep, q, p, {a.data + k * a.ld + i, a.ld, 1}, {w, ld, kPanel},
         out.data + k * out.ld + j, out.ld, add);
}

// to [q, p] = w^T, w [p, q]
inline void transpose(const float* w, int64_t p, int64_t q, int64_t ld, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < p; ++i)
    for (int64_t j = 0; j < q; ++j) to[j * ld_to + i] = w[i * ld + j];
}

}  // namespace
}  // namespace sslops
