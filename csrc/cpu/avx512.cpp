// The CPU kernels for x86-64 with AVX-512 (x86-64-v4).
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

#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512cd,prefer-vector-width=512")
#define DTR_ISA avx512
#define DTR_VECTOR_BYTES 64
#include "kernels.inl"
#include "surgery.inl"
#endif
