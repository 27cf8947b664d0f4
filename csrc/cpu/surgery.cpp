// PCGrad on coefficients. The CUDA kernel in csrc/cuda/surgery.cu takes the same steps in the same order.
#include <algorithm>
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

void pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients) {
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

}  // namespace dtr
