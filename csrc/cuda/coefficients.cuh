// PCGrad on K x K coefficients.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace dtr::cuda {

constexpr int kMeetings = 8;  // whose rows of G are loaded together, since a step alone would wait for memory

// Block i, one warp, makes row i of C: the projected gradient g_i' = sum_j C[i, j] g_j meets the others in turn, and
// its products with all of them, (C G)[i, :], are kept up to date. Lane l holds columns l and l + 32.
__global__ void __launch_bounds__(32)
    coefficients_kernel(int K, const double* gram, const int64_t* order, double* coefficients) {
    const int i = blockIdx.x, lane = threadIdx.x;
    const auto load_row = [&](int row, double(&out)[2]) {
        for (int half = 0; half < 2; ++half) out[half] = lane + 32 * half < K ? gram[row * K + lane + 32 * half] : 0;
    };
    const auto broadcast = [](const auto(&values)[2], int column) {
        return __shfl_sync(~0u, column < 32 ? values[0] : values[1], column % 32);
    };

    int others[2];
    uint64_t met = 0;
    for (int half = 0; half < 2; ++half) {
        const int64_t j = lane + 32 * half < K - 1 ? order[i * (K - 1) + lane + 32 * half] : -1;
        others[half] = static_cast<int>(j);
        if (j >= 0 && j < K) met |= uint64_t{1} << j;
    }
    const unsigned low = __reduce_or_sync(~0u, static_cast<unsigned>(met));
    const unsigned high = __reduce_or_sync(~0u, static_cast<unsigned>(met >> 32));
    // K - 1 numbers make up this set only if they are a permutation of it.
    const uint64_t all = ~uint64_t{0} >> (64 - K) & ~(uint64_t{1} << i);
    const bool permutation = (uint64_t{high} << 32 | low) == all;
    // A comparison with NaN is false: without this, an overflow would look like gradients without conflicts.
    bool overflow = false;
    for (int n = lane; n < K * K; n += 32) overflow |= !std::isfinite(gram[n]);
    const bool valid = permutation && !__reduce_or_sync(~0u, overflow);

    double C[2], products[2];
    load_row(i, products);
    for (int half = 0; half < 2; ++half)
        C[half] = valid ? lane + 32 * half == i : __longlong_as_double(-1);  // all bits set: NaN
    for (int first = 0; valid && first < K - 1; first += kMeetings) {
        double rows[kMeetings][2];
#pragma unroll
        for (int n = 0; n < kMeetings; ++n)
            if (first + n < K - 1) load_row(broadcast(others, first + n), rows[n]);
#pragma unroll
        for (int n = 0; n < kMeetings; ++n) {
            if (first + n == K - 1) break;
            const int j = broadcast(others, first + n);
            const double product = broadcast(products, j), norm = broadcast(rows[n], j);
            if (!(product < 0 && norm > 0)) continue;
            const double share = product / norm;
            for (int half = 0; half < 2; ++half) {
                products[half] -= share * rows[n][half];
                if (lane + 32 * half == j) C[half] -= share;
            }
        }
    }
    for (int half = 0; half < 2; ++half)
        if (lane + 32 * half < K) coefficients[i * K + lane + 32 * half] = C[half];
}

}  // namespace dtr::cuda
