// A^T B of views [N, D] in tiles, and the products that go back from them.
#pragma once
#include "strips.h"
#include "transpose.h"

namespace sslops {
namespace {

constexpr int64_t kSide = 256;  // of a tile: the larger, the less of the matrices passes by for each product
constexpr int64_t kDeep = 128;  // rows at a time: what a tile meets of them is in the second-level cache

// [N, D] in float32, panels of kSide columns one after another: what a tile meets is on few pages, its rows an odd
// number of lines apart.
struct Matrix {
  const int64_t n, d, panels, ld;
  Buffer<float> data;

  Matrix(int64_t n, int64_t d)
      : n(n), d(d), panels((d + kSide - 1) / kSide), ld(stride_of(d < kSide ? d : kSide)), data(panels * n * ld) {}
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

  float* panel(int64_t k) { return data + k * n * ld; }
  const float* panel(int64_t k) const { return data + k * n * ld; }
  int64_t width(int64_t k) const { return k + 1 < panels ? kSide : d - k * kSide; }

  void take(const Strip& strip, int64_t first, int64_t width) {  // up to whole vectors
    float* const to = panel(first / kSide) + first % kSide;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; j += kLanes) store(to + i * ld + j, strip.operand(i, j));
  }

  void copy_to(float* out) const {  // [N, D]
    parallel_for(n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; k < panels; ++k)
        for (int64_t i = begin; i < end; ++i)
          std::memcpy(out + i * d + k * kSide, panel(k) + i * ld, width(k) * sizeof(float));
    });
  }
};

// s = A^T B of panel i of a and panel j of b, columns of s up to whole vectors
inline void multiply(const Matrix& a, int64_t i, const Matrix& b, int64_t j, float* s, int64_t ld) {
  for (int64_t k = 0; k < a.n; k += kDeep)
    gemm(a.width(i), b.width(j), a.n - k < kDeep ? a.n - k : kDeep, {a.panel(i) + k * a.ld, 1, a.ld},
         {b.panel(j) + k * b.ld, b.ld, kPanel}, s, ld, k > 0);
}

// out [count, q] (+)= rows from `first` of a's panel i times w [panel's width, q]
inline void multiply_back(const Matrix& a, int64_t i, int64_t first, int64_t count, const float* w, int64_t ld,
                          int64_t q, float* out, int64_t ld_out, bool add) {
  for (int64_t k = 0; k < count; k += kDeep)
    gemm(at_most(count - k, kDeep), q, a.width(i), {a.panel(i) + (first + k) * a.ld, a.ld, 1}, {w, ld, kPanel},
         out + k * ld_out, ld_out, add);
}
inline void multiply_back(const Matrix& a, int64_t i, const float* w, int64_t ld, int64_t q, Matrix& out, int64_t j,
                          bool add) {
  multiply_back(a, i, 0, a.n, w, ld, q, out.panel(j), out.ld, add);
}

}  // namespace
}  // namespace sslops
