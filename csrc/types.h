#pragma once
#include <cstdint>

namespace dtr {

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

}  // namespace dtr
