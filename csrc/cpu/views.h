// The rows of one view, two or more as both operands of S = z z^T, and its tiles, each for its rows and its columns:
// what the symmetric losses are epilogues of.
#pragma once
#include "rows.h"
#include "softmax_tiles.h"
#include "tiles.h"
#include "tournament.h"

namespace sslops {
namespace {

struct Views {
  int64_t n, views, m, d, split, padded, side;  // split: the rows of z0, which may be all; padded: m to whole groups
  Rows parts[2];                                // z0 and z1
  const int32_t* classes;                       // [N], at least 0, or null
  Scale scale;
  DType operand_dtype;
  Buffer<int32_t> row_classes;
  Operand z;

  // inv_norm [M] is written here.
  Views(const Tensor& z0, const Tensor& z1, const Tensor& classes, double temperature, bool normalize, DType operand,
        const Tensor& inv_norm)
      : n(z0.sizes[z0.dim - 2]),
        views(z1.dim        ? 2
              : z0.dim == 3 ? z0.sizes[0]
                            : 1),
        m(views * n),
        d(z0.sizes[z0.dim - 1]),
        split(z1.dim ? n : m),
        padded(round_up(m, kGroup)),
        side(tile_side(m)),
        parts{{z0, normalize, inv_norm.as<float>()}, {z1.dim ? z1 : z0, normalize, inv_norm.as<float>() + split}},
        classes(classes.as<int32_t>()),
        scale(temperature, normalize),
        operand_dtype(operand),
        row_classes(classes ? padded : 0),
        z(m, d, operand) {
    for (int64_t i = 0; i < padded && classes; ++i) row_classes[i] = i < m ? this->classes[i % n] : -1;
    float* const inverse = inv_norm.as<float>();
    parallel_tickets((m + kGroup - 1) / kGroup, [&](int64_t ticket) {
      const int64_t first = ticket * kGroup, count = m - first < kGroup ? m - first : kGroup;
      for (int64_t i = first; i < first + count; ++i) inverse[i] = part(i).norm_of(place(i));
      z.fill(first, count, [&](int64_t i, int64_t j, int lanes) { return at(i, j, lanes); });
    });
  }

  const Rows& part(int64_t i) const { return parts[i >= split]; }
  int64_t place(int64_t i) const { return i < split ? i : i - split; }
  // Another view of row i, k = 1 .. views - 1; row i is the k-th from the end of that one.
  int64_t positive(int64_t i, int64_t k) const { return i + k * n < m ? i + k * n : i + k * n - m; }
  // Of the operand.
  SSLOPS_INLINE F at(int64_t i, int64_t j, int lanes) const {
    return round_to(operand_dtype, part(i).at(place(i), j, lanes));
  }
  // The k-th of the rows that the examples first .. first + count have, view by view.
  int64_t row(int64_t k, int64_t first, int64_t count) const { return k / count * n + first + k % count; }
};

// The tiles of S on and above the diagonal, of all examples, in memory that stays until the losses are known.
struct HeldTiles {
  int64_t panels, size;  // size: of a tile, in floats

  explicit HeldTiles(int64_t m)
      : panels(ceil_div(m, tile_side(m))), size(tile_side(m) * stride_of(round_up(tile_side(m), kGroup))) {}

  int64_t count() const { return panels * (panels + 1) / 2; }
  bool are_few() const { return count() * size * static_cast<int64_t>(sizeof(float)) <= kMaxHeld; }
  int64_t place(int64_t i, int64_t j) const { return (i * (2 * panels - i + 1) / 2 + j - i) * size; }
};

// prepare(part), to set to -inf what is no candidate (a term of exactly 0), and visit(tile, part) over the tiles of S:
// on and above the diagonal, or all those of the rows of some examples. In both cases a row's tiles come in a fixed
// order, one at a time. held: where the tiles of all examples stay, or null; ready: they are there, and prepared.
template <typename Prepare, typename Visit>
void for_each_tile(const Views& x, int64_t first, int64_t count, float* held, bool ready, const Prepare& prepare,
                   const Visit& visit) {
  const auto product = [&](Tile& tile, int64_t i0, int64_t rows, int64_t j0, int64_t columns, bool mirrored) {
    const Part part{tile.s, tile.ld, i0, rows, j0, columns, mirrored};
    if (!ready) {
      tile.multiply(x.z, i0, rows, x.z, j0, columns);
      prepare(part);
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t j = columns; j < part.width(); ++j) part.row(k)[j] = -kInf;
    }
    visit(tile, part);
  };
  if (count == x.n) {
    const HeldTiles tiles(x.m);
    Tournament(tiles.panels)
        .run([&] { return Tile(x.side, x.z.bf16); },
             [&](int64_t i, int64_t j, Tile& tile) {
               const int64_t i0 = i * x.side, j0 = j * x.side;
               float* const at = held ? held + tiles.place(i, j) : nullptr;
               tile.move(at);
               if (i != j) return product(tile, i0, x.side, j0, at_most(x.m - j0, x.side), true);
               // Symmetry saves nothing in the tiles on the diagonal: they are small.
               const int64_t end = i0 + at_most(x.m - i0, x.side);
               for (int64_t a = i0; a < end; a += kGroup)
                 for (int64_t b = a; b < end; b += kGroup) {
                   if (at) tile.move(at + (a - i0) * tile.ld + b - i0);
                   product(tile, a, at_most(end - a, kGroup), b, at_most(end - b, kGroup), a != b);
                 }
             });
  } else {
    const int64_t blocks = (count + kGroup - 1) / kGroup;
    parallel_tickets(
        x.views * blocks, [&] { return Tile(kMaxSide, x.z.bf16); },
        [&](int64_t ticket, Tile& tile) {
          const int64_t view = ticket / blocks * x.n + first, from = ticket % blocks * kGroup;
          for (int64_t j = 0; j < x.m; j += kMaxSide)
            product(tile, view + from, at_most(count - from, kGroup), j, at_most(x.m - j, kMaxSide), false);
        });
  }
}

// dz0 and dz1 of the examples from `first` on, all rows in dz0 if there is no dz1, from dL/dz = (W z + what add(i, v)
// adds to row i's) / tau, where weigh(part) makes of a prepared tile of S, which held may have, that of W. Returns what
// these rows add to dL/dtau = -sum_i <z_i, dL/dz_i> / (2 tau).
template <typename Prepare, typename Weigh, typename Add>
float differentiate(const Views& x, int64_t first, int64_t count, float* held, const Prepare& prepare,
                    const Weigh& weigh, const Add& add, const Tensor& dz0, const Tensor& dz1) {
  const int64_t ld = x.z.ld;
  // Of a part, each view has rows of its own to the end of its last tile: no two threads write to one.
  const int64_t part = round_up(count, kGroup), rows = count == x.n ? x.padded : x.views * part;
  const auto place = [&](int64_t i) { return count == x.n ? i : i / x.n * part + i % x.n - first; };
  Buffer<float> dz((rows + bf16_gemm::kBlock) * ld);
  parallel_for(rows, kGroup, [&](int64_t begin, int64_t end) {
    std::memset(dz + begin * ld, 0, (end - begin) * ld * sizeof(float));
  });
  for_each_tile(x, first, count, held, held != nullptr, prepare, [&](Tile& tile, const Part& t) {
    weigh(t);
    tile.add(t.rows, t.columns, x.z, t.j0, dz + place(t.i0) * ld, x.z, t.i0, t.mirrored ? dz + t.j0 * ld : nullptr);
  });
  const float inverse = static_cast<float>(1. / x.scale.tau);
  Buffer<float> dots(x.views * count);
  parallel_for(x.views * count, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = x.row(k, first, count);
      float* const v = dz + place(i) * ld;
      add(i, v);
      for_each_vector(
          x.d, [&](int64_t j, int lanes) { store_lanes(v + j, lanes, load_lanes(v + j, lanes, 0.f) * inverse); });
      const bool second = dz1.numel && k >= count;
      dots[k] = x.part(i).backward(x.place(i), v, second ? dz1 : dz0, second ? k - count : k);
    }
  });
  double total = 0.;
  for (int64_t k = 0; k < x.views * count; ++k) total += dots[k];
  return static_cast<float>(total * -0.5 / x.scale.tau);
}

}  // namespace
}  // namespace sslops
