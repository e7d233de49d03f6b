// The last linear layer of a loss: the logits of a chunk of rows, features [rows, D] by weights [K, D], in memory that
// all threads share, and the gradients of both from what the loss makes of the logits. A thread takes a tile of
// weights.
#pragma once
#include "rows.h"
#include "tiles.h"

namespace sslops {
namespace {

class LastLayer {
 public:
  static constexpr int64_t kChunk = 256;  // rows that a chunk should have: fewer make slower products

  // unit: the rows of weight over their lengths are the weights. rows: the most that a chunk will have.
  LastLayer(const Tensor& weight, bool unit, DType operand, int64_t rows)
      : k(weight.sizes[0]),
        d(weight.sizes[1]),
        ld(stride_of(round_up(k, kGroup))),
        inverse_(k),
        weights_(weight, unit, inverse_),
        operand_(operand),
        side_(k <= 1024   ? 64
              : k <= 8192 ? 128
                          : 256),
        tiles_(ceil_div(k, side_)),
        most_(rows),
        x_(rows, d, operand, false),
        logits_(round_up(rows, kGroup) * ld) {
    parallel_for(k, kGroup, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) inverse_[j] = weights_.norm_of(j);
    });
  }

  // logits = features times weights, of rows [0, rows) whose features are at(row, column, lanes).
  template <typename At>
  void multiply(int64_t rows, const At& at) {
    rows_ = rows;
    parallel_tickets(ceil_div(rows, kGroup), [&](int64_t ticket) {
      const int64_t first = ticket * kGroup;
      x_.fill(first, at_most(rows - first, kGroup),
              [&](int64_t i, int64_t j, int lanes) { return round_to(operand_, at(i, j, lanes)); });
    });
    parallel_tickets(
        rows ? tiles_ : 0, [&] { return State(*this, true); },
        [&](int64_t tile, State& state) {
          const int64_t first = tile * side_, n = at_most(side_, k - first);
          fill(state.weights, first, n);
          state.tile.move(logits_ + first);
          state.tile.multiply(x_, 0, rows_, state.weights, 0, n);
        });
    ++chunk_;
  }

  // From their gradients, where the logits were: those of the features to row_of(row) [D], and the chunk's share of
  // that of weight to d_weight, which is whole after the last chunk. Either may be unwanted.
  template <typename RowOf>
  void differentiate(bool last, bool of_features, const RowOf& row_of, const Tensor& d_weight) {
    const int64_t length = ceil_div(tiles_, kParts), parts = ceil_div(tiles_, length), height = round_up(rows_, kGroup);
    const int64_t wide = x_.ld;
    Buffer<float> dx(of_features ? parts * height * wide : 0);
    parallel_tickets(
        parts, [&] { return State(*this, false); },
        [&](int64_t part, State& state) {
          float *const sums = of_features ? dx + part * height * wide : nullptr, *const dw = state.dw;
          if (sums) std::memset(sums, 0, height * wide * sizeof(float));
          for (int64_t tile = part * length; tile < at_most((part + 1) * length, tiles_); ++tile) {
            const int64_t first = tile * side_, n = at_most(side_, k - first);
            if (sums) fill(state.weights, first, n);
            std::memset(dw, 0, round_up(n, kGroup) * wide * sizeof(float));
            state.tile.move(logits_ + first);
            state.tile.add(rows_, n, state.weights, 0, sums, x_, 0, d_weight ? dw : nullptr);
            for (int64_t i = 0; i < n && d_weight; ++i) add_to(d_weight, first + i, dw + i * wide, last);
          }
        });
    parallel_for(of_features ? rows_ : 0, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* const to = row_of(i);
        for_each_vector(d, [&](int64_t j, int lanes) {
          F total{};
          for (int64_t part = 0; part < parts; ++part) total += load(dx + (part * height + i) * wide + j);
          store_lanes(to + j, lanes, total);
        });
      }
    });
  }

  float* logits() { return logits_; }

  const int64_t k, d, ld;  // ld: from a row of logits to the next

 private:
  static constexpr int64_t kParts = 32;  // of the weights at most, each with a sum for the features' gradient

  struct State {
    Operand weights;
    Tile tile;
    Buffer<float> dw;

    State(const LastLayer& layer, bool forward)
        : weights(layer.side_, layer.d, layer.operand_, forward),
          tile(layer.most_ > layer.side_ ? layer.most_ : layer.side_, layer.x_.bf16, layer.ld),
          dw(forward ? 0 : layer.side_ * layer.x_.ld) {}
  };

  void fill(Operand& to, int64_t first, int64_t n) const {
    to.fill(0, n,
            [&](int64_t i, int64_t j, int lanes) { return round_to(operand_, weights_.at(first + i, j, lanes)); });
  }

  // v, the chunk's gradient of row i of the weights, joins those before.
  void add_to(const Tensor& d_weight, int64_t i, float* v, bool last) const {
    float* const to = d_weight.as<float>() + i * d;
    for_each_vector(chunk_ > 1 ? d : 0, [&](int64_t j, int lanes) {
      store_lanes(v + j, lanes, load_lanes(v + j, lanes, 0.f) + load_lanes(to + j, lanes, 0.f));
    });
    if (last)
      weights_.backward(i, v, d_weight, i);
    else
      std::memcpy(to, v, d * sizeof(float));
  }

  Buffer<float> inverse_;
  const Rows weights_;
  const DType operand_;
  const int64_t side_, tiles_, most_;
  int64_t rows_ = 0, chunk_ = 0;
  Operand x_;
  Buffer<float> logits_;
};

}  // namespace
}  // namespace sslops
