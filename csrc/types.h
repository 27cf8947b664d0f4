#pragma once

namespace dtr {

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

}  // namespace dtr
