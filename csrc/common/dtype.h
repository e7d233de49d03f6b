// Codes of the element types that Python passes in, and conversions to and from float32.
#pragma once
#include <cstdint>

namespace sslops {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

}  // namespace sslops
