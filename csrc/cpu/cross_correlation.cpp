#include "cross_correlation.h"

#include "correlation.h"

namespace sslops::cross_correlation {
namespace {

// moments [2, 2, D], the view's among them
View view(const Tensor& z, int64_t k, double eps, DType operand, const Tensor& moments) {
  return {z, true, eps, operand, 1, moments ? moments.as<double>() + 2 * k * z.sizes[1] : nullptr};
}

void forward(Tensor z_a, Tensor z_b, double eps, Tensor moments, DType operand, int64_t n, Tensor c) {
  const Matrix a(view(z_a, 0, eps, operand, moments)), b(view(z_b, 1, eps, operand, moments));
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

// g [N, D] = A dC^T, or with transposed A dC
void product(const View& v, const float* dc, bool transposed, float* g) {
  const Matrix a(v);
  constexpr int64_t ld = stride_of(kSide);
  const int64_t d = a.d, blocks = ceil_div(16, a.panels), rows = round_up(ceil_div(a.n, blocks), kDeep);
  parallel_tickets(
      a.panels * blocks, [&] { return Buffer<float>((kSide + rows) * ld); },
      [&](int64_t ticket, Buffer<float>& w) {
        const int64_t j = ticket / blocks, first = ticket % blocks * rows, count = at_most(a.n - first, rows);
        const int64_t q = a.width(j);
        float* const out = w + kSide * ld;
        for (int64_t i = 0; i < a.panels && count > 0; ++i) {
          const float* const from = dc + (transposed ? i * d + j : j * d + i) * kSide;
          if (transposed)
            for (int64_t k = 0; k < a.width(i); ++k) std::memcpy(w + k * ld, from + k * d, q * sizeof(float));
          else
            transpose(from, q, a.width(i), d, w, ld);
          multiply_back(a, i, first, count, w, ld, q, out, ld, i > 0);
        }
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(g + (first + i) * d + j * kSide, out + i * ld, q * sizeof(float));
      });
}

void backward(Tensor z_a, Tensor z_b, double eps, Tensor moments, DType operand, Tensor dc, Tensors out) {
  const Tensor views[2] = {z_a, z_b};
  for (int64_t k = 0; k < 2; ++k) {
    const Tensor &z = views[k], &to = out.data[k];
    if (!to) continue;
    Buffer<float> scratch(moments ? 0 : z.numel);
    float* const g = moments ? to.as<float>() : scratch;
    product(view(views[1 - k], 1 - k, eps, operand, moments), dc.as<float>(), k == 1, g);
    if (!moments) normalize_backward({z, true, eps, DType::f32}, g, nullptr, 1. / static_cast<double>(z.sizes[0]), to);
  }
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>};
}

}  // namespace sslops::cross_correlation
