#include "cross_correlation.h"

#include "correlation.h"

namespace sslops::cross_correlation {
namespace {

void forward(Tensor z_a, Tensor z_b, double eps, Tensor moments_a, Tensor moments_b, DType operand, int64_t n,
             Tensor c) {
  const Matrix a(View(z_a, true, eps, operand, 1, moments_a)), b(View(z_b, true, eps, operand, 1, moments_b));
  constexpr int64_t ld = stride_of(kSide);
  const float inverse = static_cast<float>(1. / static_cast<double>(n));
  parallel_tickets(
      a.panels * a.panels, [&] { return Buffer<float>(kSide * ld); },
      [&](int64_t ticket, Buffer<float>& s) {
        const int64_t i = ticket / a.panels, j = ticket % a.panels;
        multiply(a, i, b, j, s, ld);
        float* const to = c.as<float>() + (i * a.d + j) * kSide;
        for (int64_t k = 0; k < a.width(i); ++k)
          for_each_vector(b.width(j), [&](int64_t l, int lanes) {
            store_lanes(to + k * a.d + l, lanes, load(s + k * ld + l) * inverse);
          });
      });
}

void product(Tensor z, double eps, Tensor moments, DType operand, Tensor dc, bool transposed, Tensor g) {
  const Matrix a(View(z, true, eps, operand, 1, moments));
  constexpr int64_t ld = stride_of(kSide);
  const int64_t d = a.d, blocks = ceil_div(16, a.panels), rows = round_up(ceil_div(a.n, blocks), kDeep);
  parallel_tickets(
      a.panels * blocks, [&] { return Buffer<float>((kSide + rows) * ld); },
      [&](int64_t ticket, Buffer<float>& w) {
        const int64_t j = ticket / blocks, first = ticket % blocks * rows, count = at_most(a.n - first, rows);
        const int64_t q = a.width(j);
        float* const out = w + kSide * ld;
        for (int64_t i = 0; i < a.panels && count > 0; ++i) {
          const float* const from = dc.as<float>() + (transposed ? i * d + j : j * d + i) * kSide;
          if (transposed)
            for (int64_t k = 0; k < a.width(i); ++k) std::memcpy(w + k * ld, from + k * d, q * sizeof(float));
          else
            transpose(from, q, a.width(i), d, w, ld);
          multiply_back(a, i, first, count, w, ld, q, out, ld, i > 0);
        }
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(g.as<float>() + (first + i) * d + j * kSide, out + i * ld, q * sizeof(float));
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<product>};
}

}  // namespace sslops::cross_correlation
