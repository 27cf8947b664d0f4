// Linear combinations of the gradients, a few columns of all K rows per thread. No product is skipped, so that NaN and
// inf in a gradient reach the result whatever its coefficient.
#pragma once
#include <type_traits>

#include "elements.cuh"
#include "table.cuh"

namespace dtr::cuda {

constexpr int kCombineThreads = 128;

// Calls f(N as a type, segment, column) for the thread's columns: N neighbours at a time; one at a time where the rows
// are not aligned or the segment ends.
template <int N, class F>
__device__ void for_each_column(const Table& table, F f) {
    table.for_each_chunk([&](int64_t, int segment, int64_t begin, int64_t end) {
        if ((table.aligned >> segment & 1) && end - begin == kCombineThreads * N)
            f(std::integral_constant<int, N>{}, segment, begin + threadIdx.x * N);
        else
#pragma unroll 1
            for (int64_t column = begin + threadIdx.x; column < end; column += kCombineThreads)
                f(std::integral_constant<int, 1>{}, segment, column);
    });
}

using CombineKernel = void (*)(Table, const double*);

// Columns per thread for at most Rows gradients: what registers hold, and enough for each coefficient that is read.
template <class T, int Rows>
constexpr int kCombineColumns = Rows <= 32 ? 4 : 2;

template <class T, int Rows>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ Table table, const double* coefficients) {
    constexpr int N = kCombineColumns<T, Rows>;
    const int K = table.rows_per_segment;
    __shared__ __align__(16) float C[Rows][Rows];
    for (int n = threadIdx.x; n < Rows * Rows; n += kCombineThreads) {
        const int i = n / Rows, j = n % Rows;
        C[i][j] = i < K && j < K ? static_cast<float>(coefficients[i * K + j]) : 0.0f;
    }
    __syncthreads();

    for_each_column<N>(table, [&](auto together, int segment, int64_t column) {
        constexpr int N = decltype(together)::value;
        Pack<T, N> loaded[Rows] = {};
#pragma unroll
        for (int k = 0; k < Rows; ++k)
            if (k < K) loaded[k] = load<N>(table.row<const T>(segment, k) + column);
        float x[Rows][N];
#pragma unroll
        for (int k = 0; k < Rows; ++k)
#pragma unroll
            for (int n = 0; n < N; ++n) x[k][n] = widened(loaded[k].values[n]);
#pragma unroll 1
        for (int i = 0; i < K; ++i) {
            float sums[N] = {};
#pragma unroll
            for (int j = 0; j < Rows; ++j)
#pragma unroll
                for (int n = 0; n < N; ++n) sums[n] += C[i][j] * x[j][n];
            store(table.row<T>(segment, i) + column, narrowed<T>(sums));
        }
    });
}

// Reads `Together` gradients at a time; the last row of each segment is the output.
template <class T, int Together>
__global__ void __launch_bounds__(kCombineThreads, 8)
    weighted_sum_kernel(const __grid_constant__ Table table, const double* weights) {
    const int K = table.rows_per_segment - 1;
    __shared__ float w[kMaxClusters];
    for (int k = threadIdx.x; k < K; k += kCombineThreads) w[k] = static_cast<float>(weights[k]);
    __syncthreads();

    for_each_column<kVector<T>>(table, [&](auto together, int segment, int64_t column) {
        constexpr int N = decltype(together)::value;
        float sums[N] = {};
        const auto add = [&](int k, const Pack<T, N>& x) {
#pragma unroll
            for (int n = 0; n < N; ++n) sums[n] += w[k] * widened(x.values[n]);
        };
        int k = 0;
#pragma unroll 1
        for (; k + Together <= K; k += Together) {
            Pack<T, N> x[Together];
#pragma unroll
            for (int n = 0; n < Together; ++n) x[n] = load<N>(table.row<const T>(segment, k + n) + column);
#pragma unroll
            for (int n = 0; n < Together; ++n) add(k + n, x[n]);
        }
#pragma unroll 1
        for (; k < K; ++k) add(k, load<N>(table.row<const T>(segment, k) + column));
        store(table.row<T>(segment, K) + column, narrowed<T>(sums));
    });
}

}  // namespace dtr::cuda
