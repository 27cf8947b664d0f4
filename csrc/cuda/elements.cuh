// Elements of the three dtypes, several at a time, as fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dtr::cuda {

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ T narrowed(float x);
template <>
__device__ inline float narrowed<float>(float x) {
    return x;
}
template <>
__device__ inline __half narrowed<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// N elements that move in one instruction, from an address that is a multiple of their size.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T values[N];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int N, class T>
__device__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ void store(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class T, int N>
__device__ Pack<T, N> narrowed(const float (&x)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int n = 0; n < N; ++n) pack.values[n] = narrowed<T>(x[n]);
    return pack;
}

}  // namespace dtr::cuda
