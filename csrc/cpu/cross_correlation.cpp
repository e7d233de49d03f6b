#include "cross_correlation.h"

#include "correlation.h"

namespace sslops::cross_correlation {
namespace {

void forward(Tensor z_a, Tensor z_b, double eps, Tensor moments_a, Tensor moments_b, DType operand, int64_t n,
             Tensor c) {
  const Matrix a(View(z_a, true, eps, operand, 1, moments_a)), b(View(z_b, true, eps, operand, 1, moments_b));
  const int64_t d = a.d, panels = (d + kSide - 1) / kSide, ld = stride_of(kSide);
  const float inverse = static_cast<float>(1. / static_cast<double>(n));
  parallel_tickets(
      panels * panels, [&] { return Buffer<float>(kSide * ld); },
      [&](int64_t ticket, Buffer<float>& s) {
        const int64_t i = ticket / panels * kSide, j = ticket % panels * kSide, p = d - i < kSide ? d - i : kSide,
                      q = d - j < kSide ? d - j : kSide;
        multiply(a, i, p, b, j, q, s, ld);
        for (int64_t k = 0; k < p; ++k)
          for_each_vector(q, [&](int64_t l, int lanes) {
            store_lanes(c.as<float>() + (i + k) * d + j + l, lanes, load(s + k * ld + l) * inverse);
          });
      });
}

void product(Tensor z, double eps, Tensor moments, DType operand, Tensor dc, bool transposed, Tensor g) {
  const Matrix a(View(z, true, eps, operand, 1, moments));
  const int64_t d = a.d, panels = (d + kSide - 1) / kSide, ld = stride_of(kSide);
  struct State {
    Buffer<float> w;
    Matrix out;
  };
  parallel_tickets(
      panels, [&] { return State{Buffer<float>(d * ld), Matrix(a.n, kSide)}; },
      [&](int64_t ticket, State& state) {
        const int64_t j = ticket * kSide, q = d - j < kSide ? d - j : kSide;
        const float* const from = dc.as<float>();
        for (int64_t i = 0; i < d; i += kSide) {
          const int64_t p = d - i < kSide ? d - i : kSide;
          if (transposed)
            for (int64_t k = i; k < i + p; ++k) std::memcpy(state.w + k * ld, from + k * d + j, q * sizeof(float));
          else
            transpose(from + j * d + i, q, p, d, state.w + i * ld, ld);
        }
        multiply_back(a, 0, d, state.w, ld, q, state.out, 0, false);
        for (int64_t i = 0; i < a.n; ++i)
          std::memcpy(g.as<float>() + i * d + j, state.out.data + i * state.out.ld, q * sizeof(float));
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, product};
}

}  // namespace sslops::cross_correlation
