// What the losses of images and their texts log: how many of the others exceed each pair's similarity, 2 N^2 D FLOP.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::exceeding {

struct Table {
  // out [B] = <image_i, text_i>, the very numbers that the tiles of S hold there: where all pairs are alike, none
  // exceeds
  void (*similarity)(Tensor image, Tensor text, bool normalize, DType operand, Tensor out);
  // rows [B]: with how many of the texts [N] an image's product exceeds that with its own, of_images [B]; columns [N]:
  // the same of texts, images and of_texts [N]. Image i's own text is first + i, or not among these.
  void (*count)(Tensor image, Tensor text, bool normalize, DType operand, int64_t first, Tensor of_images,
                Tensor of_texts, Tensor rows, Tensor columns);

  static constexpr auto bound() {
    return std::tuple{Bound{"exceeding_similarity", &Table::similarity}, Bound{"exceeding_count", &Table::count}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::exceeding
