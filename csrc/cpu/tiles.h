// Tiles of A B^T and the products that go back from them, for one thread: in float32, or on AMX tiles, which keep the
// float32 result of bf16 operands. A loss is an epilogue: what it makes of a tile in between.
#pragma once
#include "bf16_gemm.h"
#include "buffer.h"
#include "gemm.h"
#include "transpose.h"
#include "vec.h"

namespace sslops {
namespace {

constexpr int64_t kFewRows = 8;
constexpr int64_t kGroup = 64;  // rows that are filled at once; tiles begin at multiples of it
// Bytes of S that forward may hold until the losses are known, for their gradients
constexpr int64_t kMaxHeld = 16 << 20;

// Candidates that pass by the rows of a loss: how many at a time, and how many of those chunks make a part that a
// thread takes, where the blocks of rows alone do not fill the threads. Fixed by the shapes: results do not depend on
// threads.
int64_t chunk_rows(int64_t candidates) { return candidates <= 1024 ? 64 : candidates <= 8192 ? 128 : 256; }
int64_t chunks_of_part(int64_t candidates, int64_t blocks) {
  constexpr int64_t kTickets = 64;  // to aim at, in parts of 512 candidates or more if there are 8: they are joined
  const int64_t chunks = ceil_div(candidates, chunk_rows(candidates));
  const int64_t enough = candidates < 8 * 512 ? 8 : candidates / 512;
  const int64_t most = blocks ? at_most(ceil_div(kTickets, blocks), enough) : 1;
  return chunks ? ceil_div(chunks, at_most(chunks, most)) : 1;
}

// A matrix in float32 whose rows miss each other's cache sets: an odd number of lines apart.
constexpr int64_t stride_of(int64_t columns) {
  return round_up(columns, 16) / 16 % 2 ? round_up(columns, 16) : round_up(columns, 16) + 16;
}

#ifdef __AMX_BF16__
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// Rows [n, d] as operands of both products, in float32 unless bf16 is asked for and there.
class Operand {
 public:
  // right: it will be the right operand of A B^T, not the left one alone.
  Operand(int64_t n, int64_t d, DType operand, bool right = true)
      : bf16(kHasBf16 && operand == DType::bf16),
        few(!bf16 && n <= kFewRows),
        d(d),
        ld(bf16 ? round_up(d, bf16_gemm::kBlock) : stride_of(d)),
        right_(right),
        rows_(bf16 ? 0 : round_up(n, kGroup) * ld),
        columns_(bf16 || !right ? 0 : round_up(n, kGroup) * d),
        halves_(bf16 ? (round_up(n, kGroup) + bf16_gemm::kBlock) * ld : 0),  // a tile's rows begin anywhere: one more
        as_right_(bf16 ? round_up(n, kGroup) * ld : 0),
        transposed_(bf16 ? round_up(n, kGroup) * ld : 0) {}

  // Rows [first, first + count) from at(row, column, lanes), values as the operand dtype holds them. first is a
  // multiple of kGroup; zeros follow the last row.
  template <typename At>
  void fill(int64_t first, int64_t count, At&& at) {
    for (int64_t i = 0; i < round_up(count, kGroup); ++i) {
      const int64_t row = first + i, used = i < count ? d : 0;
      for_each_vector(used, [&](int64_t j, int lanes) {
        if (bf16)
          store_from_float(halves_, DType::bf16, row * ld + j, lanes, at(row, j, lanes));
        else
          store_lanes(rows_ + row * ld + j, lanes, at(row, j, lanes));
      });
      for (int64_t j = used; j < ld; ++j) bf16 ? void(halves_[row * ld + j] = 0) : void(rows_[row * ld + j] = 0.f);
    }
    for (int64_t i = first; i < first + count; i += kGroup) bf16 ? pack_halves(i) : right_ ? pack(i) : void();
  }

  const bool bf16, few;
  const int64_t d, ld;  // columns; from a row of it, and of what is accumulated from it, to the next

 private:
  friend class Tile;

  void pack(int64_t group) {
    for (int64_t i = group; i < group + kGroup; i += kPanel)
      transpose(rows_ + i * ld, kPanel, d, ld, columns_ + i * d, kPanel);
  }
  void pack_halves(int64_t group) {
    if constexpr (kHasBf16)
      bf16_gemm::SSLOPS_ISA::table.pack(halves_ + group * ld, kGroup, ld, as_right_ + group * ld,
                                        transposed_ + group * ld);
  }

  const bool right_;
  Buffer<float> rows_, columns_;                     // columns: of kPanel rows each, transposed
  Buffer<uint16_t> halves_, as_right_, transposed_;  // right operands: the rows, and their transpose
};

// A thread's tile of up to `side` rows and columns.
class Tile {
 public:
  // elsewhere: it has no memory of its own, and s will be moved to where rows are so far apart.
  Tile(int64_t side, bool bf16, int64_t elsewhere = 0)
      : ld(elsewhere ? elsewhere : stride_of(round_up(side, kGroup))),
        own_(elsewhere ? 0 : round_up(side, kGroup) * ld),
        w_ld_(stride_of(round_up(side, kGroup))),
        w_(bf16 ? round_up(side, kGroup) * w_ld_ : 0),
        w_transposed_(bf16 ? round_up(side, kGroup) * w_ld_ : 0) {
    move(nullptr);
  }

  // From here on s lies there; if null, in memory of its own.
  void move(float* to) { s = to ? to : static_cast<float*>(own_); }

  // s = a[i0 .. i0 + m) b[j0 .. j0 + n)^T; columns up to whole vectors are written.
  void multiply(const Operand& a, int64_t i0, int64_t m, const Operand& b, int64_t j0, int64_t n) {
    if (a.bf16) {
      if constexpr (kHasBf16)
        bf16_gemm::SSLOPS_ISA::table.matmul(a.halves_ + i0 * a.ld, a.ld, {b.transposed_ + j0 * b.ld, 16 * b.ld, 512},
                                            padded(m), padded(n), a.ld, s, ld, false);
      return;
    }
    if (b.few) return dots(m, n, a.rows_ + i0 * a.ld, b.rows_ + j0 * b.ld, a.ld, a.d);
    gemm(m, n, a.d, {a.rows_ + i0 * a.ld, a.ld, 1}, {b.columns_ + j0 * b.d, kPanel, b.d * kPanel}, s, ld, false);
  }

  // rows [m, d] += s b[j0 ..) and columns [n, d] += s^T a[i0 ..); either may be null. Uses the operands' row stride.
  void add(int64_t m, int64_t n, const Operand& b, int64_t j0, float* rows, const Operand& a, int64_t i0,
           float* columns) {
    if (b.bf16) return add_halves(m, n, b, j0, rows, a, i0, columns);
    if (rows) gemm(m, b.d, n, {s, ld, 1}, {b.rows_ + j0 * b.ld, b.ld, kPanel}, rows, b.ld, true);
    if (columns) gemm(n, a.d, m, {s, 1, ld}, {a.rows_ + i0 * a.ld, a.ld, kPanel}, columns, a.ld, true);
  }

  const int64_t ld;
  float* s;

 private:
  // Of few rows the products are sums in lanes, as a BLAS has them: with fewer roundings than one after another.
  void dots(int64_t m, int64_t n, const float* a, const float* b, int64_t ld_of_rows, int64_t d) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < round_up(n, kLanes); ++j) {
        const float *const x = a + i * ld_of_rows, *const y = b + j * ld_of_rows;
        F sums[4]{};
        in_chains(j < n ? d : 0, [&](int64_t k, int chain, int lanes) {
          sums[chain] += load_lanes(x + k, lanes, 0.f) * load_lanes(y + k, lanes, 0.f);
        });
        s[i * ld + j] = sum(sums);
      }
  }

  static int64_t padded(int64_t x) { return round_up(x, bf16_gemm::kBlock); }

  void add_halves(int64_t m, int64_t n, const Operand& b, int64_t j0, float* rows, const Operand& a, int64_t i0,
                  float* columns) {
    if constexpr (kHasBf16) {
      const auto& table = bf16_gemm::SSLOPS_ISA::table;
      table.round_both(s, ld, m, n, rows ? static_cast<uint16_t*>(w_) : nullptr, w_ld_, w_transposed_, w_ld_);
      const auto product = [&](const uint16_t* w, int64_t rows, int64_t inner, const Operand& x, int64_t from,
                               float* to) {
        table.matmul(w, w_ld_, {x.as_right_ + from * x.ld, 512, 32 * x.ld}, padded(rows), x.ld, padded(inner), to, x.ld,
                     true);
      };
      if (rows) product(w_, m, n, b, j0, rows);
      if (columns) product(w_transposed_, n, m, a, i0, columns);
    }
  }

  Buffer<float> own_;
  const int64_t w_ld_;
  Buffer<uint16_t> w_, w_transposed_;
};

}  // namespace
}  // namespace sslops
