// Shared by the CPU kernels of gradient surgery for every instruction set.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../surgery.h"

namespace dtr {

namespace {

bool is_permutation_of_others(int64_t K, int64_t i, const int64_t* order) {
    uint64_t seen = uint64_t{1} << i;
    for (int64_t step = 0; step < K - 1; ++step) {
        const int64_t j = order[step];
        if (j < 0 || j >= K || (seen >> j & 1)) return false;
        seen |= uint64_t{1} << j;
    }
    return true;
}

}  // namespace

// The CUDA kernel in csrc/cuda/coefficients.cuh takes the same steps in the same order.
void pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients) {
    // A comparison with NaN is false: without this, an overflow would look like gradients without conflicts.
    if (!std::all_of(gram, gram + K * K, [](double x) { return std::isfinite(x); })) {
        std::fill(coefficients, coefficients + K * K, std::numeric_limits<double>::quiet_NaN());
        return;
    }
    std::vector<double> products(K);
    double* v = products.data();  // (C G)[i, :]
    for (int64_t i = 0; i < K; ++i) {
        const int64_t* others = order + i * (K - 1);
        double* C = coefficients + i * K;
        if (!is_permutation_of_others(K, i, others)) {
            std::fill(C, C + K, std::numeric_limits<double>::quiet_NaN());
            continue;
        }
        std::fill(C, C + K, 0.0);
        C[i] = 1;
        std::copy(gram + i * K, gram + (i + 1) * K, v);
        for (int64_t step = 0; step < K - 1; ++step) {
            const int64_t j = others[step];
            const double* G = gram + j * K;
            if (v[j] < 0 && G[j] > 0) {
                const double c = v[j] / G[j];
                C[j] -= c;
                for (int64_t k = 0; k < K; ++k) v[k] -= c * G[k];
            }
        }
    }
}

void prefer_huge_pages(void* data, int64_t bytes) {
    constexpr uintptr_t kHugePage = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
    // A hint: where the system refuses it, small pages serve.
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace dtr
