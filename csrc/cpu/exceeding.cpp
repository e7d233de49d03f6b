#include "exceeding.h"

#include "pairs.h"

namespace sslops::exceeding {
namespace {

void similarity(Tensor image, Tensor text, bool normalize, DType operand, Tensor out) {
  constexpr int64_t kBlock = 32;
  const Pairs x(image, text, normalize, operand, 0);
  parallel_tickets(
      ceil_div(x.b, kBlock), [&] { return Tile(kBlock, x.right.bf16); },
      [&](int64_t ticket, Tile& tile) {
        const int64_t first = ticket * kBlock, count = at_most(x.b - first, kBlock);
        tile.multiply(x.left, first, count, x.right, first, count);
        for (int64_t k = 0; k < count; ++k) out.as<float>()[first + k] = tile.s[k * tile.ld + k];
      });
}

void count(Tensor image, Tensor text, bool normalize, DType operand, int64_t first, Tensor of_images, Tensor of_texts,
           Tensor rows, Tensor columns) {
  const Pairs x(image, text, normalize, operand, first);
  Buffer<float> own(x.sums()), above(x.sums());
  for (int64_t k = 0; k < x.sums(); ++k) own[k] = above[k] = 0.f;
  for (int64_t i = 0; i < x.b; ++i) own[i] = of_images.as<float>()[i];
  for (int64_t j = 0; j < x.n; ++j) own[x.padded + j] = of_texts.as<float>()[j];
  for_each_tile(x, [&](const Tile&, const Part& t, int64_t j0) {
    for_each_pair(x, t, j0, [&](int64_t, float& s) { s = -kInf; });
    count_exceeding(t, own, above);
  });
  for (int64_t i = 0; i < x.b; ++i) rows.as<float>()[i] = above[i];
  for (int64_t j = 0; j < x.n; ++j) columns.as<float>()[j] = above[x.padded + j];
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<similarity>, together<count>};
}

}  // namespace sslops::exceeding
