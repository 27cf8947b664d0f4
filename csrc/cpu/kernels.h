// The CPU kernels: element-wise passes over token rows, between the GEMMs that PyTorch runs.
//
// Plain C interface: pointers, sizes and dtypes, no libtorch. Every row is widened to the compute type (float, or
// double for fp64 input) in a buffer that stays in L1, so one source serves every combination of dtypes. Sums over
// tokens are left as one partial sum per chunk of tokens, in a fixed order that does not depend on the thread count.
#pragma once
#include <cstdint>

#include "../types.h"

namespace dtr {

// A tensor whose rows of the last dimension are contiguous; stride counts elements between rows.
struct Rows {
    void* data = nullptr;  // null where the argument is absent
    Type type = Type::f32;
    int64_t stride = 0;
};

struct Shape {
    int64_t B, N, C;
    const int32_t* start;  // [B], null when unrouted
    int64_t width;
    int64_t chunk;  // tokens per partial sum
};

// Token tensors [B, N, *] first, then vectors [B, *] in the compute type. u and du hold the window alone where `compact`,
// else all channels; with `keep_branch` the window masks x alone; with `rms` nothing is subtracted, and mean is null.
struct NormForward {
    Shape shape;
    Rows x, branch, stream, u;
    Rows gate, shift, scale, mean, rstd;
    double eps;
    bool compact, keep_branch, rms;
    Type stream_type;  // what the sum is rounded to, also where it is not written
};

struct NormBackward {
    Shape shape;
    Rows du, dstream, x, branch, dx, dbranch;
    Rows gate, scale, mean, rstd, inactive;  // inactive with `compact` and without `rms` alone
    Rows sums;  // [2 or 3 (with a branch), B, chunks, C]: shift, scale, gate
    bool compact, keep_branch, rms, x_is_stream;
};

struct ResidualForward {
    Shape shape;
    Rows x, branch, out;
    Rows gate;
};

struct ResidualBackward {
    Shape shape;
    Rows dout, branch, dbranch;
    Rows gate, sums;  // sums [B, chunks, C]
};

enum class Activation { gelu_tanh, gelu, silu, swiglu };

// Contiguous rows of `width` channels, of swiglu twice as many in pre and dpre; dact and dpre are null in the forward pass.
struct ActivationPass {
    Activation kind;
    int64_t rows, width;
    Rows pre, act, dact, dpre;
};

struct Kernels {
    const char* isa;
    void (*norm_forward)(const NormForward&);
    void (*norm_backward)(const NormBackward&);
    void (*residual_forward)(const ResidualForward&);
    void (*residual_backward)(const ResidualBackward&);
    void (*activation)(const ActivationPass&);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace dtr
