#include "bf16_gemm.h"

#include "transpose.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace sslops::bf16_gemm {
namespace {

#ifdef __AMX_BF16__

constexpr int64_t kTile = 16, kTileValues = 512;
static_assert(kLanes == kTile);

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
  for (int64_t half = 0; half < rows / kTile; ++half) {  // 16 rows: half of a tile along k, or a whole one along n
    const uint16_t* src = x + half * kTile * cols;
    // B = x: rows are k, so a row and the next one interleave.
    uint16_t* out = as_is + half / 2 * kBlock * cols + half % 2 * (kTileValues / 2);
    for (int64_t j = 0; j < cols; j += kTile, out += kTileValues)
      for (int64_t k = 0; k < kTile / 2; ++k) {
        H even, odd;
        std::memcpy(&even, src + 2 * k * cols + j, sizeof even);
        std::memcpy(&odd, src + (2 * k + 1) * cols + j, sizeof odd);
        const U pairs = __builtin_convertvector(even, U) | __builtin_convertvector(odd, U) << 16;
        std::memcpy(out + k * kBlock, &pairs, sizeof pairs);
      }
    // B = x^T: rows are n, and pairs along k lie side by side already.
    out = transposed + half * kTile * cols;
    for (int64_t j = 0; j < cols; j += kBlock, out += kTileValues) {
      F v[16];
      for (int64_t k = 0; k < kTile; ++k) std::memcpy(&v[k], src + k * cols + j, sizeof v[k]);
      transpose(v);
      std::memcpy(out, v, sizeof v);
    }
  }
}

void matmul(const uint16_t* a, int64_t lda, Packed b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc,
            bool accumulate) {
  const int64_t a_stride = lda * 2, c_stride = ldc * 4;
  const TileScope scope;
  for (int64_t i = 0; i < m; i += kBlock)
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
}

void round_both(const float* x, int64_t ld, int64_t rows, int64_t cols, uint16_t* as_is, int64_t ld_as_is,
                uint16_t* transposed, int64_t ld_transposed) {
  const auto blocks = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
  const auto store_pair = [](uint16_t* out, F left, F right) {
    const __m512bh row = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(out, &row, sizeof row);
  };
  for (int64_t i = 0; i < blocks(rows) * kBlock; i += kBlock)
    for (int64_t j = 0; j < blocks(cols) * kBlock; j += kBlock) {
      F v[2][2][16];  // 32 x 32 values as four quarters
      for (int64_t k = 0; k < kBlock; ++k)
        for (int64_t right = 0; right < 2; ++right) {
          const int64_t left = cols - j - right * kTile;
          const int lanes = static_cast<int>(i + k >= rows || left < 0 ? 0 : left < kTile ? left : kTile);
          v[k / kTile][right][k % kTile] = load_lanes(x + (i + k) * ld + j + right * kTile, lanes, 0.f);
        }
      for (int64_t k = 0; as_is && k < kBlock; ++k)
        store_pair(as_is + (i + k) * ld_as_is + j, v[k / kTile][0][k % kTile], v[k / kTile][1][k % kTile]);
      for (auto& half : v)
        for (auto& quarter : half) transpose(quarter);
      for (int64_t k = 0; k < kBlock; ++k)
        store_pair(transposed + (j + k) * ld_transposed + i, v[0][k / kTile][k % kTile], v[1][k / kTile][k % kTile]);
    }
}

#else
constexpr auto pack = nullptr, matmul = nullptr, round_both = nullptr;
#endif

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{pack, matmul, round_both};
}

}  // namespace sslops::bf16_gemm
