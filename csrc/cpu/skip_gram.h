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

  // For the k-th of `count` ids the sum of weights[p] rows[source[p]], p from begin[k] on, in this order; source and
  // weights [n]. In row k of out, or if it is `whole` in row unique[k], where all other rows are 0.
  void (*sum)(Tensor rows, Tensor source, Tensor weights, Tensor begin, Tensor unique, int64_t count, bool whole,
              Tensor out);

  static constexpr auto bound() {
    return std::tuple{Bound{"skip_gram_forward", &Table::forward}, Bound{"skip_gram_sort", &Table::sort},
                      Bound{"skip_gram_sum", &Table::sum}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::skip_gram
