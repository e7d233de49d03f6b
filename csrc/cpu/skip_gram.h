// Word2Vec's skip-gram with negative sampling (arXiv 1310.4546, Eq. 4) over two tables of embeddings: rows are
// gathered, multiplied and summed where they are, nothing of [B, N, D] is written; gradients are of the rows that were
// looked at.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::skip_gram {

struct Table {
  // input [V, D], output [W, D]; ids: centers [B], contexts [B], negatives [B, N]. loss [B]: softplus(-u v_context) +
  // sum softplus(u v_negative), without negatives that are the context; or [], their sum or mean. Unless empty, slopes
  // [B, 1 + N]: the derivatives by the products, the context's first; dcenter [B, D], float32: those by the u.
  void (*forward)(Tensor input, Tensor output, Tensor centers, Tensor contexts, Tensor negatives, bool mean,
                  Tensor loss, Tensor slopes, Tensor dcenter);

  // ids [n], none above `highest`: those that there are, ascending, go to unique [n], and the k-th one's places,
  // ascending, are order[begin[k]] .. order[begin[k + 1] - 1]; order [n], begin [n + 1]. Returns how many there are.
  int64_t (*sort)(Tensor ids, int64_t highest, Tensor order, Tensor begin, Tensor unique);

  // For the k-th of `count` ids the sum over its places q of grad slopes[q] rows[i]: of pair q / (1 + N) the gradient,
  // i its center; or, without both slopes and centers, of grad rows[q]. grad [B], or [] for all, over B if mean. In row
  // unique[k] of out, or, if it has no more rows than are found, in row k.
  void (*sum)(Tensor rows, Tensor centers, Tensor slopes, Tensor grad, bool mean, Tensor order, Tensor begin,
              Tensor unique, int64_t count, Tensor out);

  static constexpr auto bound() {
    return std::tuple{Bound{"skip_gram_forward", &Table::forward}, Bound{"skip_gram_sort", &Table::sort},
                      Bound{"skip_gram_sum", &Table::sum}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::skip_gram
