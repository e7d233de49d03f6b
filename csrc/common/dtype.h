// Codes of the element types.
#pragma once
#include <cstdint>

namespace sslops {

enum class DType : int { f32, f16, bf16, f64, u8, i64, i32, i16, i8, boolean, other };  // floating-point ones first
constexpr int kDTypes = static_cast<int>(DType::other);

}  // namespace sslops
