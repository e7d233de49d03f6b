#include "barlow_twins.h"

#include "correlation.h"
#include "gram.h"
#include "rows.h"

namespace sslops::barlow_twins {
namespace {

struct Pair {
  Strip a, b;

  Pair(const View& a, const View& b) : a(a), b(b) {}
};

// visit(first column, width, strips of both views), and the diagonal of C in c [D]
template <typename Visit>
void for_each_pair(const View& a, const View& b, float* c, const Visit& visit) {
  for_each_strip(
      a.d, [&] { return Pair(a, b); },
      [&](int64_t first, int64_t width, Pair& strip) {
        strip.a.fill(a, first, width);
        strip.b.fill(b, first, width);
        Sums total{};
        down(a.n, width, [&](int64_t i, int64_t end, int64_t j, int) {
          F part{};
          for (; i < end; ++i) part += strip.a.operand(i, j) * strip.b.operand(i, j);
          total[j / kLanes] += widen(part);
        });
        for_each_vector(width, [&](int64_t j, int lanes) {
          store_lanes(c + first + j, lanes, narrow(total[j / kLanes] / static_cast<double>(a.n)));
        });
        visit(first, width, strip);
      });
}

void grams(Tensor z_a, Tensor z_b, double eps, DType operand, int64_t batches, int64_t first, Tensor c, Tensor grams,
           Tensor sums) {
  const View va(z_a, true, eps, operand, batches), vb(z_b, true, eps, operand, batches);
  const double n = static_cast<double>(va.n);
  Transposed a(va), b(vb);
  for_each_pair(va, vb, c.as<float>(), [&](int64_t from, int64_t width, const Pair& strip) {
    a.pack(strip.a, from, width);
    b.pack(strip.b, from, width);
  });
  double* const out = sums.as<double>();
  out[0] = gram<2>({&a, &b}, first, grams.sizes[1], grams.as<float>()) / (n * n);
  out[1] = out[2] = 0.;
  for (int64_t j = 0; j < va.d; ++j) {
    const double own = c.as<float>()[j];
    out[1] += own * own;
    out[2] += (1. - own) * (1. - own);
  }
}

constexpr float kByPanels = 2.f;  // in the place of a correlation, as kernels/cpu/barlow_twins.py knows

double by_grams(double lambd, Tensor c, Tensor sums) {
  const double *const of = sums.as<double>(), total = of[0], squares = of[1], missing = of[2];
  if (!keeps_digits(squares, total)) *c.as<float>() = kByPanels;
  return missing + lambd * (total - squares);
}

void backward_gram(double grad, Tensor z_a, Tensor z_b, double lambd, double eps, DType operand, int64_t batches,
                   int64_t first, Tensor c, Tensor grams, Tensor g, Tensors dz) {
  constexpr int64_t kStride = stride_of(kStrip);
  const View va(z_a, true, eps, operand, batches), vb(z_b, true, eps, operand, batches);
  const int64_t rows = grams.sizes[1];
  const double n = static_cast<double>(va.n);
  const float weight = static_cast<float>(2. * lambd / (n * n));
  struct State {
    Pair strip;
    Buffer<float> t;
  };
  for_each_strip(
      va.d, [&] { return State{{va, vb}, Buffer<float>(rows * kStride)}; },
      [&](int64_t from, int64_t width, State& state) {
        auto& [strip, t] = state;
        const int64_t kept = batches > 1 ? first / rows : 0;
        strip.a.fill(va, from, width, kept);
        strip.b.fill(vb, from, width, kept);
        F slope[kStrip / kLanes];
        for_each_vector(width, [&](int64_t j, int lanes) {
          const D own = widen(load_lanes(c.as<float>() + from + j, lanes, 0.f));
          slope[j / kLanes] = narrow((-2. * (1. - own) - 2. * lambd * own) / n);
        });
        const auto back = [&](int64_t view, const Strip& own, const Strip& other, const Tensor& out) {
          gemm(rows, width, va.n, {grams.as<float>() + (1 - view) * rows * va.n, va.n, 1}, own.right(), t, kStride,
               false);
          const auto at = [&](int64_t i, int64_t j, int) {
            return load(t + i * kStride + j) * weight + other.operand(first + i, j) * slope[j / kLanes];
          };
          if (g) {
            down(rows, width, [&](int64_t i, int64_t end, int64_t j, int lanes) {
              for (; i < end; ++i)
                store_lanes(g.as<float>() + (view * rows + i) * va.d + from + j, lanes, at(i, j, lanes));
            });
            return;
          }
          const auto exact = [&](int64_t i, int64_t j) { return own.exact(first + i, j); };
          Sums mean{}, along{};
          gradient_means(rows, width, at, exact, mean, along);
          normalize_backward(rows, width, at, exact, mean, along, own.var, eps, grad, out, from);
        };
        if (g || dz.data[0]) back(0, strip.a, strip.b, dz.data[0]);
        if (g || dz.data[1]) back(1, strip.b, strip.a, dz.data[1]);
      });
}

// A part of a row of N C becomes dL/dC / N; returns its share of the loss. own: where the diagonal is, if in it; c:
// what.
double weigh_row(float* row, int64_t count, int64_t own, double c, double n, double lambd) {
  const bool has_own = own >= 0 && own < count;
  const float slope = static_cast<float>(2. * lambd / (n * n));
  if (has_own) row[own] = 0.f;
  F squares{};
  for_each_vector(count, [&](int64_t j, int lanes) {
    const F v = load_lanes(row + j, lanes, 0.f);
    squares += v * v;
    store_lanes(row + j, lanes, v * slope);
  });
  const double off = lambd * sum(squares) / (n * n), missing = 1. - c;
  if (!has_own) return off;
  row[own] = static_cast<float>(-2. * missing / n);
  return off + missing * missing;
}

double weigh(Tensor s, int64_t n, int64_t first, double lambd) {
  const int64_t d = s.sizes[1];
  return sum_rows(s.sizes[0], [&](int64_t i) {
    float* const row = s.as<float>() + i * d;
    return weigh_row(row, d, first + i, row[first + i] / static_cast<double>(n), static_cast<double>(n), lambd);
  });
}

// In round r panel i of A meets panel i + r of B: in a round no two tiles add to the same panel of dA or dB.
// The loss; the diagonal of C in c [D]; dL/dA, dL/dB in g [2, N, D] if there is one
double panels(Tensor z_a, Tensor z_b, double lambd, double eps, DType operand, float* c, float* g) {
  const View va(z_a, true, eps, operand), vb(z_b, true, eps, operand);
  Matrix a(va.n, va.d), b(va.n, va.d);
  for_each_pair(va, vb, c, [&](int64_t from, int64_t width, const Pair& strip) {
    a.take(strip.a, from, width);
    b.take(strip.b, from, width);
  });
  constexpr int64_t ld = stride_of(kSide);
  const int64_t n = a.n, d = a.d, panels = a.panels;
  Matrix da(g ? n : 0, d), db(g ? n : 0, d);
  Buffer<double> losses(panels * panels);
  Buffer<int32_t> progress(2 * panels);
  for (int64_t i = 0; i < 2 * panels; ++i) progress[i] = 0;
  parallel_tickets(
      panels * panels, [&] { return Buffer<float>(2 * kSide * ld); },
      [&](int64_t ticket, Buffer<float>& s) {
        const int64_t round = ticket / panels, i = ticket % panels, j = (i + round) % panels;
        const int64_t i0 = i * kSide, j0 = j * kSide, p = a.width(i), q = b.width(j);
        float* const transposed = s + kSide * ld;
        multiply(a, i, b, j, s, ld);
        double loss = 0.;
        for (int64_t k = 0; k < p; ++k)
          loss += weigh_row(s + k * ld, q, i0 + k - j0, c[i0 + k], static_cast<double>(n), lambd);
        losses[ticket] = loss;
        if (!g) return;
        transpose(s, p, q, ld, transposed, ld);
        const auto in_turn = [&](int32_t* turn, auto&& run) {
          wait_for(turn, static_cast<int32_t>(round));
          run();
          advance(turn);
        };
        in_turn(progress + i, [&] { multiply_back(b, j, transposed, ld, p, da, i, round > 0); });
        in_turn(progress + panels + j, [&] { multiply_back(a, i, s, ld, q, db, j, round > 0); });
      });
  double loss = 0.;
  for (int64_t k = 0; k < panels * panels; ++k) loss += losses[k];
  if (g) {
    da.copy_to(g);
    db.copy_to(g + n * d);
  }
  return loss;
}

double forward(Tensor z_a, Tensor z_b, bool by_gram, double lambd, double eps, DType operand, Tensor c, Tensor kept,
               Tensor sums) {
  if (!by_gram) return panels(z_a, z_b, lambd, eps, operand, c.as<float>(), kept.as<float>());
  grams(z_a, z_b, eps, operand, 1, 0, c, kept, sums);
  const double loss = by_grams(lambd, c, sums);
  if (*c.as<float>() != kByPanels) return loss;
  Buffer<float> diagonal(c.numel);
  return panels(z_a, z_b, lambd, eps, operand, diagonal, nullptr);
}

void backward(double grad, Tensor z_a, Tensor z_b, bool by_gram, double lambd, double eps, DType operand,
              int64_t batches, int64_t first, Tensor c, Tensor kept, Tensor g, Tensors dz) {
  if (by_gram && *c.as<float>() != kByPanels)
    return backward_gram(grad, z_a, z_b, lambd, eps, operand, batches, first, c, kept, g, dz);
  const Tensor views[2] = {z_a, z_b};
  Buffer<float> diagonal(by_gram ? c.numel : 0), made(by_gram ? 2 * z_a.numel : 0);
  if (by_gram) panels(z_a, z_b, lambd, eps, operand, diagonal, made);
  const float* const of = by_gram ? static_cast<float*>(made) : kept.as<float>();
  for (int64_t k = 0; k < 2; ++k)
    if (dz.data[k])
      normalize_backward({views[k], true, eps, DType::f32}, of + k * z_a.numel, nullptr, grad, dz.data[k]);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>, together<grams>, by_grams, together<weigh>};
}

}  // namespace sslops::barlow_twins
