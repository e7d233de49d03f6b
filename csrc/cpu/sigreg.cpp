#include "sigreg.h"

#include <math.h>

#include "log.h"
#include "random.h"
#include "rows.h"
#include "tiles.h"
#include "turn.h"

namespace sslops::sigreg {
namespace {

constexpr int64_t kSlices = kGroup;  // of a tile
constexpr int kTogether = 4;         // rows whose turns are in registers at once

// ---- directions: in double, so that they are the reference's, rounded ----

// In (0, 1), from 23 bits, so that it is exact.
SSLOPS_INLINE F uniform(U word) { return (__builtin_convertvector((I)(word >> 9), F) + 0.5f) * 0x1p-23f; }

// The root of -2 ln u for u in (0, 1)
SSLOPS_INLINE D radius(F u) {
  const D squared = log_of(u) * -2.;
  F rounded = __builtin_convertvector(squared, F);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) rounded[k] = sqrtf(rounded[k]);
  const D root = widen(rounded);
  return (squared / root + root) * 0.5;
}

// Two normal numbers of Box and Muller's: of radius r at the angle 2 pi v.
SSLOPS_INLINE void normals(D r, F v, D& first, D& second) {
  const D half = widen(v - 0.5f) * 3.141592653589793, square = half * half;  // of the opposite angle
  D sine = square * -7.647163731819816e-13 + 1.6059043836821613e-10;         // 1 / n!
  sine = sine * square - 2.505210838544172e-08;
  sine = sine * square + 2.7557319223985893e-06;
  sine = sine * square - 1.984126984126984e-04;
  sine = sine * square + 8.333333333333333e-03;
  sine = sine * square - 1. / 6.;
  sine = sine * square * half + half;
  D cosine = square * 4.779477332387385e-14 - 1.1470745597729725e-11;
  cosine = cosine * square + 2.08767569878681e-09;
  cosine = cosine * square - 2.755731922398589e-07;
  cosine = cosine * square + 2.48015873015873e-05;
  cosine = cosine * square - 1.388888888888889e-03;
  cosine = cosine * square + 1. / 24.;
  cosine = cosine * square - 0.5;
  cosine = cosine * square + 1.;
  first = (sine * sine * 2. - 1.) * r;
  second = sine * cosine * -2. * r;
}

// Four words, two radii and two angles, make four numbers.
void draw(Tensor key, Tensor directions) {
  const uint64_t seed = *key.as<uint64_t>();
  const int64_t d = directions.sizes[1], blocks = ceil_div(d, 4);
  parallel_for(directions.sizes[0], 1 + 4096 / (d + 1), [&](int64_t begin, int64_t end) {
    constexpr int kCount = 2 * kBlocks;
    uint32_t words[4 * kBlocks], radii[kCount], angles[kCount];
    Buffer<double> row(round_up(d, 4 * kBlocks));
    for (int64_t i = begin; i < end; ++i) {
      double squares = 0.;
      for (int64_t first = 0; first < blocks; first += kBlocks) {
        draw_blocks(seed, static_cast<uint64_t>(i * blocks + first), RandomStream::sigreg, words);
        for (int k = 0; k < kCount; ++k) {
          radii[k] = words[k / 2 * 4 + k % 2];
          angles[k] = words[k / 2 * 4 + k % 2 + 2];
        }
        double* const to = row + 4 * first;
        for (int k = 0; k < kCount; k += kLanes) {
          U r, angle;
          std::memcpy(&r, radii + k, sizeof r);
          std::memcpy(&angle, angles + k, sizeof angle);
          D cosines, sines;
          normals(radius(uniform(r)), uniform(angle), cosines, sines);
          double one[kLanes], other[kLanes];
          std::memcpy(one, &cosines, sizeof one);
          std::memcpy(other, &sines, sizeof other);
          for (int lane = 0; lane < kLanes; ++lane) {
            to[(k + lane) / 2 * 4 + lane % 2] = one[lane];
            to[(k + lane) / 2 * 4 + lane % 2 + 2] = other[lane];
          }
        }
      }
      for (int64_t j = 0; j < d; ++j) squares += row[j] * row[j];
      const double norm = sqrt(squares);
      for (int64_t j = 0; j < d; ++j) directions.as<float>()[i * d + j] = static_cast<float>(row[j] / norm);
    }
  });
}

// ---- knots ----

struct Knots {
  int64_t count;
  double step;
  Buffer<float> phi;

  Knots(const Tensor& sums, double step) : count(sums.sizes[2]), step(step), phi(count) {
    for (int64_t k = 0; k < count; ++k) phi[k] = static_cast<float>(normal(k));
  }
  double t(int64_t k) const { return static_cast<double>(k + 1) * step; }
  double normal(int64_t k) const { return exp(-t(k) * t(k) / 2.); }
  // Of the trapezoidal rule from -t_max to t_max
  double weight(int64_t k) const { return (k + 1 < count ? 2. : 1.) * step * normal(k); }
};

double statistic(Tensor sums, double step) {
  const Knots knots(sums, step);
  const int64_t m = sums.sizes[3];
  return sum_rows(sums.sizes[0] * 2 * knots.count, [&](int64_t row) {
    D squares{};
    for_each_vector(m, [&](int64_t j, int lanes) {
      const D value = widen(load_lanes(sums.as<float>() + row * m + j, lanes, 0.f));
      squares += value * value;
    });
    return knots.weight(row % knots.count) * sum(squares);
  });
}

// ---- tiles of u ----

struct Projections {
  const int64_t views, n, m, d;
  const float step;
  Operand z, directions;

  Projections(const Tensor& z, const Tensor& directions, double step)
      : views(z.sizes[0]),
        n(z.sizes[1]),
        m(directions.sizes[0]),
        d(z.sizes[2]),
        step(static_cast<float>(step)),
        z(views * n, d, DType::f32, false),
        directions(m, d, DType::f32) {
    fill(this->z, z, views * n);
    fill(this->directions, directions, m);
  }

  static void fill(Operand& to, const Tensor& from, int64_t rows) {
    const int64_t d = from.sizes[from.dim - 1];
    parallel_for(ceil_div(rows, kGroup), 8, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kGroup; first < at_most(end * kGroup, rows); first += kGroup)
        to.fill(first, at_most(kGroup, rows - first), [&](int64_t i, int64_t j, int lanes) {
          return load_as_float(from.data, from.dtype, i * d + j, lanes);
        });
    });
  }
};

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// visit(row, count): kTogether rows at a time, and then one by one.
template <typename Visit>
SSLOPS_INLINE void together(int64_t rows, Visit&& visit) {
  int64_t i = 0;
  for (; i + kTogether <= rows; i += kTogether) visit(i, Count<kTogether>{});
  for (; i < rows; ++i) visit(i, Count<1>{});
}

// e^(i t_k u), afresh: of the last rows, which may be all there are, and no others' roundings beside theirs.
SSLOPS_INLINE Turn turn_to(F u, float step, int64_t k) { return turn(u * (step * static_cast<float>(k + 1))); }

// Adds kCount rows' cos(t u) - phi and sin(t u) to sums [knots, 2] of as many slices as there are lanes.
template <int kCount>
SSLOPS_INLINE void add_turns(const float* u, int64_t ld, const Knots& knots, float step, float* sums) {
  if constexpr (kCount == 1) {
    for (int64_t k = 0; k < knots.count; ++k, sums += 2 * kLanes) {
      const Turn t = turn_to(load(u), step, k);
      store(sums, load(sums) + ((1.f - t.versine) - knots.phi[k]));
      store(sums + kLanes, load(sums + kLanes) + t.sine);
    }
    return;
  }
  F sine[kCount], versine[kCount], c[kCount], s[kCount];
  for (int r = 0; r < kCount; ++r) {
    const Turn t = turn(load(u + r * ld) * step);
    s[r] = sine[r] = t.sine, versine[r] = t.versine, c[r] = 1.f - t.versine;
  }
  for (int64_t k = 0; k < knots.count; ++k, sums += 2 * kLanes) {
    F cosines = c[0], sines = s[0];
    for (int r = 1; r < kCount; ++r) cosines += c[r], sines += s[r];
    store(sums, load(sums) + (cosines - static_cast<float>(kCount) * knots.phi[k]));
    store(sums + kLanes, load(sums + kLanes) + sines);
    for (int r = 0; r < kCount; ++r) {
      const F turned = (c[r] - sine[r] * s[r]) - versine[r] * c[r];
      s[r] = (s[r] + sine[r] * c[r]) - versine[r] * s[r];
      c[r] = turned;
    }
  }
}

void forward(Tensor z, Tensor directions, double step, Tensor sums) {
  const Projections x(z, directions, step);
  const Knots knots(sums, step);
  const int64_t tiles = ceil_div(x.m, kSlices), of_tile = 2 * knots.count * kSlices;
  struct State {
    Tile tile;
    Buffer<float> part;
    Buffer<double> totals;  // [kSlices / kLanes, knots, 2, kLanes]
  };
  parallel_tickets(
      x.views * tiles,
      [&] { return State{Tile(kGroup, false), Buffer<float>(2 * knots.count * kLanes), Buffer<double>(of_tile)}; },
      [&](int64_t ticket, State& state) {
        const int64_t view = ticket / tiles, j0 = ticket % tiles * kSlices, width = at_most(kSlices, x.m - j0);
        Tile& tile = state.tile;
        std::memset(state.totals, 0, of_tile * sizeof(double));
        for (int64_t i = 0; i < x.n; i += kGroup) {
          const int64_t rows = at_most(kGroup, x.n - i);
          tile.multiply(x.z, view * x.n + i, rows, x.directions, j0, width);
          double* total = state.totals;
          for (int64_t j = 0; j < width; j += kLanes) {
            float* const part = state.part;
            std::memset(part, 0, 2 * knots.count * kLanes * sizeof(float));
            together(rows, [&](int64_t r, auto count) {
              add_turns<count.value>(tile.s + r * tile.ld + j, tile.ld, knots, x.step, part);
            });
            for (int64_t k = 0; k < 2 * knots.count * kLanes; ++k) total[k] += part[k];
            total += 2 * knots.count * kLanes;
          }
        }
        for (int64_t k = 0; k < 2 * knots.count; ++k) {  // a row at a time: a power of two apart they share cache sets
          float* const to = sums.as<float>() + ((view * 2 + k % 2) * knots.count + k / 2) * x.m + j0;
          for_each_vector(width, [&](int64_t j, int lanes) {
            D total;
            std::memcpy(&total, state.totals + j * 2 * knots.count + k * kLanes, sizeof total);
            store_lanes(to + j, lanes, __builtin_convertvector(total, F));
          });
        }
      });
}

// From so many knots on, the rounding of 1 - versine, which is the same at each, costs digits.
constexpr int64_t kMany = 32;

// u [kCount rows] becomes its gradient: the real part of sum_k (a_k + i b_k) e^(i t_k u), by Horner's rule.
template <int kCount, bool kIsMany>
void differentiate(float* u, int64_t ld, int64_t count, float step, const float* coefficients) {
  if constexpr (kCount == 1) {
    F real{};
    for (int64_t k = 0; k < count; ++k, coefficients += 2 * kLanes) {
      const Turn t = turn_to(load(u), step, k);
      const F a = load(coefficients);
      real += (a - a * t.versine) - load(coefficients + kLanes) * t.sine;
    }
    return store(u, real);
  }
  F sine[kCount], versine[kCount], cosine[kCount], p[kCount], q[kCount];
  for (int r = 0; r < kCount; ++r) {
    const Turn t = turn(load(u + r * ld) * step);
    sine[r] = t.sine, versine[r] = t.versine, cosine[r] = 1.f - t.versine, p[r] = q[r] = F{};
  }
  for (int64_t k = count; k-- > 0;) {
    const F a = load(coefficients + 2 * k * kLanes), b = load(coefficients + (2 * k + 1) * kLanes);
    for (int r = 0; r < kCount; ++r) {
      const F real =
          kIsMany ? (a - q[r] * sine[r]) + (p[r] - p[r] * versine[r]) : (a + p[r] * cosine[r]) - q[r] * sine[r];
      q[r] = kIsMany ? (b + p[r] * sine[r]) + (q[r] - q[r] * versine[r]) : (b + q[r] * cosine[r]) + p[r] * sine[r];
      p[r] = real;
    }
  }
  for (int r = 0; r < kCount; ++r) store(u + r * ld, p[r] * cosine[r] - q[r] * sine[r]);
}

void backward(double scale, Tensor z, Tensor directions, double step, Tensor sums, Tensor dz) {
  const Projections x(z, directions, step);
  const Knots knots(sums, step);
  const int64_t count = knots.count, ld = x.directions.ld, total = x.views * x.n;
  const int64_t height = total >= 4096 ? kGroup : total >= 512 ? kGroup / 2 : kGroup / 4;
  const int64_t blocks = ceil_div(x.n, height);
  Buffer<float> factors(count);
  for (int64_t k = 0; k < count; ++k) factors[k] = static_cast<float>(scale * knots.weight(k) * knots.t(k));
  struct State {
    Tile tile;
    Buffer<float> coefficients, rows;  // [kSlices / kLanes, knots, 2, kLanes]; [height, ld]
  };
  parallel_tickets(
      x.views * blocks,
      [&] { return State{Tile(kGroup, false), Buffer<float>(2 * count * kSlices), Buffer<float>(height * ld)}; },
      [&](int64_t ticket, State& state) {
        const int64_t view = ticket / blocks, i0 = ticket % blocks * height, rows = at_most(height, x.n - i0);
        Tile& tile = state.tile;
        std::memset(state.rows, 0, height * ld * sizeof(float));
        for (int64_t j0 = 0; j0 < x.m; j0 += kSlices) {
          const int64_t width = at_most(kSlices, x.m - j0);
          tile.multiply(x.z, view * x.n + i0, rows, x.directions, j0, width);
          const float* const cosines = sums.as<float>() + view * 2 * count * x.m + j0;
          float* to = state.coefficients;
          for_each_vector(width, [&](int64_t j, int lanes) {
            for (int64_t k = 0; k < count; ++k, to += 2 * kLanes) {
              store(to, load_lanes(cosines + (count + k) * x.m + j, lanes, 0.f) * factors[k]);
              store(to + kLanes, load_lanes(cosines + k * x.m + j, lanes, 0.f) * factors[k]);
            }
          });
          for (int64_t j = 0; j < width; j += kLanes)
            together(rows, [&](int64_t r, auto at_once) {
              const auto run = count > kMany ? differentiate<at_once.value, true> : differentiate<at_once.value, false>;
              run(tile.s + r * tile.ld + j, tile.ld, count, x.step, state.coefficients + j * 2 * count);
            });
          tile.add(rows, width, x.directions, j0, state.rows, x.z, 0, nullptr);
        }
        for (int64_t i = 0; i < rows; ++i)
          for_each_vector(x.d, [&](int64_t j, int lanes) {
            store_from_float(dz.data, dz.dtype, (view * x.n + i0 + i) * x.d + j, lanes,
                             load_lanes(state.rows + i * ld + j, lanes, 0.f));
          });
      });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{draw, sslops::together<forward>, sslops::together<statistic>, sslops::together<backward>};
}

}  // namespace sslops::sigreg
