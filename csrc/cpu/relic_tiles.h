// RELIC's pairs: two views' rows, their products in tiles, and which of a tile's pairs are negatives, the rows that
// follow a row in cyclic order.
#pragma once
#include "rows.h"
#include "softmax.h"
#include "tiles.h"
#include "tournament.h"

namespace sslops::relic {
namespace {

constexpr int64_t kMaxSide = 128;

// Which panels of rows have pairs, i with j if one's rows are negatives of the other's; j >= i.
struct Panels {
  int64_t n, negatives, side, count;
  Buffer<int64_t> first;  // of each panel's tiles, among those of all

  Panels(int64_t n, int64_t negatives)
      : n(n),
        negatives(negatives),
        // Small enough to give every thread a tile, and not to be empty for the most part in a narrow band. Fixed by
        // the batch: results do not depend on the threads.
        side(n <= 512 || negatives <= kGroup ? kGroup : kMaxSide),
        count((n + side - 1) / side),
        first(count + 1) {
    first[0] = 0;
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + near_end(i) - i + count - far_begin(i);
  }

  // Up to near_end the rows of j follow those of i; from far_begin on, those of i follow them in cyclic order.
  int64_t near_end(int64_t i) const {
    const int64_t end = (i + 1) * side + negatives;
    return end < n ? (end + side - 1) / side : count;
  }
  int64_t far_begin(int64_t i) const {
    const int64_t begin = (n - negatives + i * side) / side, end = near_end(i);
    return begin < end ? end : begin < count ? begin : count;
  }
  bool meet(int64_t i, int64_t j) const { return j < near_end(i) || j >= far_begin(i); }
  int64_t place(int64_t i, int64_t j) const {
    return first[i] + j - (j < near_end(i) ? i : i + far_begin(i) - near_end(i));
  }
  // Of a pair's two tiles, in floats.
  int64_t size() const { return 2 * side * stride_of(side); }
  // How many pairs' tiles forward holds until their gradients are known: none where that would be fewer than an eighth.
  int64_t held() const {
    const int64_t most = kMaxHeld / (size() * static_cast<int64_t>(sizeof(float)));
    return first[count] <= 8 * most ? at_most(first[count], most) : 0;
  }
};

struct Batch : Panels {
  int64_t d, padded;
  float alpha, beta;
  DType operand_dtype;
  Buffer<float> inv_norm;
  Rows views[2];
  Scale scale;
  Operand online, target;

  Batch(const Tensor& o, const Tensor& t, double temperature, double alpha, double beta, int64_t negatives,
        bool normalize, DType operand)
      : Panels(o.sizes[0], negatives),
        d(o.sizes[1]),
        padded(round_up(n, kGroup)),
        alpha(static_cast<float>(alpha)),
        beta(static_cast<float>(beta)),
        operand_dtype(operand),
        inv_norm(2 * n),
        views{{o, normalize, inv_norm}, {t, normalize, inv_norm + n}},
        scale(normalize ? Scale(temperature, true) : scale_of_small(temperature)),
        online(n, d, operand),
        target(n, d, operand) {
    const int64_t groups = padded / kGroup;
    parallel_tickets(2 * groups, [&](int64_t ticket) {
      const bool which = ticket >= groups;
      const int64_t from = ticket % groups * kGroup, count = n - from < kGroup ? n - from : kGroup;
      for (int64_t i = from; i < from + count; ++i) inv_norm[which * n + i] = views[which].norm_of(i);
      (which ? target : online).fill(from, count, [&](int64_t i, int64_t j, int lanes) {
        return at(which, i, j, lanes);
      });
    });
  }

  // Of the operand.
  SSLOPS_INLINE F at(bool which, int64_t i, int64_t j, int lanes) const {
    return round_to(operand_dtype, views[which].at(i, j, lanes));
  }
  // Logits below 1 have a known maximum, normalised or not: a divergence of 1e-12 keeps its digits.
  Scale scale_of_small(double temperature) const {
    const float bound = longest(0) * longest(1);
    return Scale(temperature, bound <= temperature, bound);
  }
  // No row of a view is longer, as it is stored.
  float longest(bool which) const {
    const Rows& view = views[which];
    float most = 0.f;
    for (int64_t i = 0; i < n; ++i) most = max(1.f / sslops::inv_norm(view.x, view.dtype, i * d, d), most);
    return most;
  }
};

// A tile of S, a, and of S^T, b: rows i0.., columns j0... If mirrored (then j0 > i0), they also stand for their
// transposes: what is a to a row of the tile is b to a column. Masked: not all of its pairs are negatives both ways.
struct Part {
  float *a, *b;
  int64_t ld, i0, rows, j0, columns;
  bool mirrored, masked;

  int64_t width() const { return round_up(columns, kLanes); }
};

struct Tiles {
  Tile a, b;
};

// visit(tiles, part) over all pairs, a row's in a fixed order, one at a time, first that which holds its positive.
// held: where the first x.held() tiles lie, or null; ready: they are there from the sweep before.
template <typename Visit>
void for_each_tile(const Batch& x, float* held, bool ready, const Visit& visit) {
  const int64_t n = x.n, far = n - x.negatives;
  const auto product = [&](Tiles& tiles, float* at, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t rows = i1 - i0, columns = j1 - j0, ld = tiles.a.ld;
    const bool mirrored = i0 != j0;
    tiles.a.move(at);
    tiles.b.move(at ? at + x.size() / 2 : nullptr);
    float *const a = tiles.a.s, *const b = tiles.b.s;
    if (!(at && ready)) {
      tiles.a.multiply(x.online, i0, rows, x.target, j0, columns);
      if (mirrored) tiles.b.multiply(x.target, i0, rows, x.online, j0, columns);
      for (int64_t k = 0; k < rows && !mirrored; ++k)
        for (int64_t j = 0; j < columns; ++j) b[k * ld + j] = a[j * ld + k];
    }
    visit(tiles, Part{a, b, ld, i0, rows, j0, columns, mirrored, !mirrored || far > 1 || columns % kLanes});
  };
  Tournament(x.count).run([&] { return Tiles{Tile(x.side, x.online.bf16), Tile(x.side, x.online.bf16)}; },
                          [&](int64_t i, int64_t j, Tiles& tiles) {
                            if (!x.meet(i, j)) return;
                            const bool kept = held && x.place(i, j) < x.held();
                            float* const at = kept ? held + x.place(i, j) * x.size() : nullptr;
                            int64_t i0 = i * x.side, i1 = i0 + x.side < n ? i0 + x.side : n;
                            int64_t j0 = j * x.side, j1 = j0 + x.side < n ? j0 + x.side : n;
                            if (i == j) {  // Symmetry saves nothing in the tiles on the diagonal: they are small.
                              const auto block = [&](int64_t a, int64_t b) {
                                product(tiles, at ? at + (a - i0) * tiles.a.ld + b - i0 : nullptr, a,
                                        a + kGroup < i1 ? a + kGroup : i1, b, b + kGroup < i1 ? b + kGroup : i1);
                              };
                              for (int64_t a = i0; a < i1; a += kGroup) block(a, a);
                              for (int64_t a = i0; a < i1; a += kGroup)
                                for (int64_t b = a + kGroup; b < i1; b += kGroup) block(a, b);
                              return;
                            }
                            // Only the part of the tile that the band runs through.
                            const bool follow = j0 - i1<x.negatives, wrap = j1 - i0> far;
                            const auto raise = [](int64_t& begin, int64_t to) {
                              begin = to > begin ? to / kGroup * kGroup : begin;
                            };
                            if (follow && !wrap) {
                              if (i1 + x.negatives < j1) j1 = i1 + x.negatives;
                              raise(i0, j0 - x.negatives);
                            } else if (!follow) {
                              if (j1 - far < i1) i1 = j1 - far;
                              raise(j0, i0 + far);
                            }
                            product(tiles, at, i0, i1, j0, j1);
                          });
}

// Which columns from j on are among the negatives of row i, and which have it among theirs.
struct Masks {
  I own, other;

  SSLOPS_INLINE Masks(const Batch& x, const Part& t, int64_t i, int64_t j) {
    I lane;
    for (int k = 0; k < kLanes; ++k) lane[k] = k;
    const I inside = lane < static_cast<int32_t>(t.columns - j);
    const I steps = inside ? lane + static_cast<int32_t>(t.j0 + j - i) : I{};
    // The row's own column and those beyond the tile become n steps away. One comparison: of the product of two GCC
    // makes scalar code.
    const auto follows = [&](I steps) {
      return steps + ((steps < 1) & static_cast<int32_t>(x.n)) <= static_cast<int32_t>(x.negatives);
    };
    own = follows(steps);
    other = follows(-steps);
  }
};

}  // namespace
}  // namespace sslops::relic
