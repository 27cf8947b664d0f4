// The CPU kernels for x86-64 with AVX2, FMA and F16C (x86-64-v3).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define DTR_ISA avx2
#include "kernels.inl"
#endif
