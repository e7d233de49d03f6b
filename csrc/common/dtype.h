// Codes of the element types, as Python passes them in.
#pragma once
#include <cstdint>

namespace sslops {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, u8 = 4 };

}  // namespace sslops
