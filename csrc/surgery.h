// Gradient surgery: the plain C++ interface of the CPU and the CUDA kernels. Pointers, sizes and a dtype; no libtorch.
//
// K gradients are cut into the same segments (parameter tensors): pointer s * K + k leads to segment s of gradient k, and
// sizes[s] is that segment's number of elements. One [K, P] buffer is one segment. 1 <= K <= 64; f32, bf16 and f16.
#pragma once
#include <cstdint>

#include "types.h"

namespace dtr {

constexpr int64_t kMaxClusters = 64;

struct Gradients {
    Type type;
    int64_t K;
    int64_t segments;
    void* const* data;     // [segments, K]
    const int64_t* sizes;  // [segments]
};

// The CPU kernels of one instruction set. Matrices are row-major fp64.
//   gram:         out[i, j] = <g_i, g_j>, the same bits for any number of threads. Single products are fp32: elements
//                 beyond 1e19 give inf, and below 1e-23 they vanish.
//   combine:      g_i <- sum_j coefficients[i, j] g_j, in place, in fp32
//   weighted_sum: out[s] = sum_k weights[k] * segment s of g_k, in the gradients' dtype
struct SurgeryKernels {
    void (*gram)(const Gradients&, double* out);
    void (*combine)(const Gradients&, const double* coefficients);
    void (*weighted_sum)(const Gradients&, const double* weights, void* const* out);
};

extern const SurgeryKernels baseline_surgery;
#if defined(__x86_64__)
extern const SurgeryKernels avx2_surgery;
extern const SurgeryKernels avx512_surgery;
#endif

// order [K, K-1] (int64): row i holds the other clusters in the order in which gradient i meets them. Where it does not hold
// each of them once, row i of the coefficients is NaN. All rows are where the Gram matrix is not finite.
void pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients);

// For fresh memory of many megabytes: in pages of 4 KiB its first writing costs more than what is computed.
void prefer_huge_pages(void* data, int64_t bytes);

// The CUDA kernels: the same on device pointers (the matrices and `order` too), queued on a stream, without host
// synchronisation. `data`, `sizes` and `out` themselves are host arrays, free again when a function returns.
// Each returns null, or what went wrong.
namespace cuda {
// Doubles of scratch memory that gram needs.
int64_t gram_workspace(const Gradients&);
const char* gram(const Gradients&, double* out, double* workspace, void* stream);
const char* pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients, void* stream);
const char* combine(const Gradients&, const double* coefficients, void* stream);
const char* weighted_sum(const Gradients&, const double* weights, void* const* out, void* stream);
// Null if the kernels run on the current device.
const char* unsupported();
}  // namespace cuda

}  // namespace dtr
