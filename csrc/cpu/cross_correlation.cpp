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
  struct State {
    Buffer<float> w;
    Matrix out;
  };
  parallel_tickets(
      a.panels, [&] { return State{Buffer<float>(kSide * ld), Matrix(a.n, kSide)}; },
      [&](int64_t j, State& state) {
        const int64_t d = a.d, q = a.width(j);
        for (int64_t i = 0; i < a.panels; ++i) {
          const float* const from = dc.as<float>() + (transposed ? i * d + j : j * d + i) * kSide;
          if (transposed)
            for (int64_t k = 0; k < a.width(i); ++k) std::memcpy(state.w + k * ld, from + k * d, q * sizeof(float));
          else
            transpose(from, q, a.width(i), d, state.w, ld);
          multiply_back(a, i, state.w, ld, q, state.out, 0, i > 0);
        }
        for (int64_t i = 0; i < a.n; ++i)
          std::memcpy(g.as<float>() + i * d + j * kSide, state.out.data + i * state.out.ld, q * sizeof(float));
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, product};
}

}  // namespace sslops::cross_correlation
