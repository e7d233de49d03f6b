// Cross entropies between assignments to K prototypes: DINO (arXiv 2104.14294, Eq. 3) from crop to crop, iBOT from row
// to row. With y = student / student_temp and q_t = softmax(teacher_t / teacher_temp + bias), the loss of example b is
// the mean over pairs of views t, v of lse(y_v) - <q_t, y_v>.
#pragma once
#include "../common/isa.h"
#include "../common/tensor.h"

namespace sslops::prototypes {

struct Table {
  // student, teacher: lists of [V_i, B, K] that follow one another, views 0 .. V (T) of B examples. bias [1, K], or
  // [T, K], or none. weights of the examples, [B] float32, or none. index [B] int64: each example's row of the teacher,
  // or none: the same one. same_view: whether view v is paired with view v. mean: over the examples, not their sum.
  // losses [B], weighted; loss [], unless it is null; entropy [T, B] of the q; stats [2, V, B]: of y's softmax the
  // maximum and what 1 is divided by; gradients, as the student is: of the loss, unless there are none.
  void (*forward)(Tensors student, Tensors teacher, double student_temp, double teacher_temp, Tensor bias,
                  Tensor weights, Tensor index, bool same_view, bool mean, Tensor losses, Tensor loss, Tensor entropy,
                  Tensor stats, Tensors gradients);
  // gradients of what grad [] is the loss's, or grad [B] the losses'.
  void (*backward)(Tensors student, Tensors teacher, double student_temp, double teacher_temp, Tensor bias,
                   Tensor weights, Tensor index, bool same_view, bool mean, Tensor grad, Tensor stats,
                   Tensors gradients);

  // Both from features [V_i, B, D], whose logits are those times prototypes [K, D]; unit: times its rows over their
  // lengths. The teacher's lists are features too if there are teacher_prototypes [K, D'], and logits if not. operand:
  // the products' dtype. grad [B] of the losses, or none: 1 of the loss. losses, loss, entropy as from forward, the
  // last two unless they are null. d_student [V, B, D] and d_prototypes [K, D], float32: either may be empty.
  void (*features)(Tensors student, Tensors teacher, Tensor prototypes, Tensor teacher_prototypes, bool unit,
                   DType operand, double student_temp, double teacher_temp, Tensor bias, Tensor weights, Tensor index,
                   bool same_view, bool mean, Tensor grad, Tensor losses, Tensor loss, Tensor entropy, Tensor d_student,
                   Tensor d_prototypes);

  static constexpr auto bound() {
    return std::tuple{Bound{"prototypes_forward", &Table::forward}, Bound{"prototypes_backward", &Table::backward},
                      Bound{"prototypes_features", &Table::features}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::prototypes
