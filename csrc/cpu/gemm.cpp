#include "gemm.h"

#include "../common/parallel.h"
#include "vec.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace sslops::gemm {
namespace {

#ifdef __AMX_BF16__

constexpr int64_t kTile = 16, kTileValues = 512;

// Eight tiles of 16 rows x 64 bytes; the previous configuration is the caller's (oneDNN keeps its own) and comes back.
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(&saved_);
    Config all{};
    all.palette = 1;
    for (int k = 0; k < 8; ++k) all.rows[k] = 16, all.bytes[k] = 64;
    _tile_loadconfig(&all);
  }
  ~TileScope() { saved_.palette ? _tile_loadconfig(&saved_) : _tile_release(); }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config saved_;
};

void pack(const uint16_t* x, int64_t rows, int64_t cols, uint16_t* as_is, uint16_t* transposed) {
  const int64_t k_tiles = cols / kBlock;
  parallel_for(rows / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t row = block * kBlock; row < (block + 1) * kBlock; ++row) {
        const uint16_t* src = x + row * cols;
        // B = x: row is k, so pairs of rows interleave.
        uint16_t* out = as_is + block * kBlock * cols + (row % kBlock) / 2 * kBlock + row % 2;
        for (int64_t col = 0; col < cols; ++col) out[col / kTile * kTileValues + col % kTile * 2] = src[col];
        // B = x^T: row is n, so pairs of columns stay together.
        out = transposed + row / kTile * k_tiles * kTileValues + row % kTile * 2;
        for (int64_t col = 0; col < cols; col += 2)
          std::memcpy(out + col / kBlock * kTileValues + col % kBlock / 2 * kBlock, src + col, 4);
      }
  });
}

void matmul(const uint16_t* a, int64_t lda, Packed b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc,
            bool accumulate) {
  const int64_t a_stride = lda * 2, c_stride = ldc * 4;
  parallel_for(m / kBlock, 1, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    for (int64_t i = begin * kBlock; i < end * kBlock; i += kBlock)
      for (int64_t j = 0; j < n; j += kBlock) {
        float* c0 = c + i * ldc + j;
        float* c1 = c0 + kTile * ldc;
        if (accumulate) {
          _tile_loadd(0, c0, c_stride);
          _tile_loadd(1, c0 + kTile, c_stride);
          _tile_loadd(2, c1, c_stride);
          _tile_loadd(3, c1 + kTile, c_stride);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        const uint16_t* a0 = a + i * lda;
        const uint16_t* b0 = b.tiles + j / kTile * b.n_step;
        for (int64_t step = 0; step < k / kBlock; ++step, a0 += kBlock, b0 += b.k_step) {
          _tile_loadd(4, a0, a_stride);
          _tile_loadd(5, a0 + kTile * lda, a_stride);
          _tile_loadd(6, b0, 64);
          _tile_loadd(7, b0 + b.n_step, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c0, c_stride);
        _tile_stored(1, c0 + kTile, c_stride);
        _tile_stored(2, c1, c_stride);
        _tile_stored(3, c1 + kTile, c_stride);
      }
  });
}

// 16 x 16 floats in registers: four rounds of interleaving halves.
SSLOPS_INLINE void transpose(F (&v)[16]) {
  const I low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  for (int round = 0; round < 4; ++round) {
    F w[16];
    for (int k = 0; k < 8; ++k) {
      w[2 * k] = __builtin_shuffle(v[k], v[k + 8], low);
      w[2 * k + 1] = __builtin_shuffle(v[k], v[k + 8], high);
    }
    for (int k = 0; k < 16; ++k) v[k] = w[k];
  }
}

void round_both(const float* x, int64_t ld, int64_t rows, int64_t cols, uint16_t* as_is, uint16_t* transposed,
                int64_t ld_out) {
  const auto pad = [](int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; };
  parallel_for(pad(rows) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < end * kBlock; i += kTile)
      for (int64_t j = 0; j < pad(cols); j += kTile) {
        F v[16];
        const int64_t lanes = cols - j < kTile ? cols - j : kTile;
        for (int64_t k = 0; k < 16; ++k) {
          v[k] = F{};
          if (i + k < rows && lanes > 0) v[k] = load_lanes(x + (i + k) * ld + j, static_cast<int>(lanes), 0.f);
          const __m256bh row = _mm512_cvtneps_pbh((__m512)v[k]);
          std::memcpy(as_is + (i + k) * ld_out + j, &row, sizeof row);
        }
        transpose(v);
        for (int64_t k = 0; k < 16; ++k) {
          const __m256bh row = _mm512_cvtneps_pbh((__m512)v[k]);
          std::memcpy(transposed + (j + k) * ld_out + i, &row, sizeof row);
        }
      }
  });
}

#else
constexpr auto pack = nullptr, matmul = nullptr, round_both = nullptr;
#endif

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{pack, matmul, round_both};
}

}  // namespace sslops::gemm
