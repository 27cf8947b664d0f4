// The CPU kernels for x86-64 with AVX2, FMA and F16C (x86-64-v3).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../surgery.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define DTR_ISA avx2
#define DTR_VECTOR_BYTES 32
#include "kernels.inl"
#include "surgery.inl"
#endif
