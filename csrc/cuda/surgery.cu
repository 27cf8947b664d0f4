// Gradient surgery on CUDA devices: what surgery.h declares. Kernels are chosen and launched here; nothing is kept
// between calls, allocated or waited for, so that every call can be captured into a CUDA graph.

#include "../surgery.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <type_traits>

#include "coefficients.cuh"
#include "combine.cuh"
#include "gram.cuh"
#include "table.cuh"

namespace dtr::cuda {
namespace {

constexpr const char* kDtypes = "the kernels of gradient surgery take fp32, bf16 and fp16";

// Null, or what the error says; the runtime forgets it, so that later calls do not report it again.
const char* message(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(stream);
    return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// A kernel that shares out a table's chunks among as many blocks as run at a time.
template <class... Parameters>
class ChunkedKernel {
public:
    ChunkedKernel(void (*kernel)(Table, Parameters...), int threads) : kernel_(kernel), threads_(threads) {
        int device = 0, processors = 0, blocks_each = 0;
        error_ = message(cudaGetDevice(&device));
        if (!error_) error_ = message(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
        if (!error_)
            error_ = message(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, threads, 0));
        blocks_ = int64_t{processors} * blocks_each;
    }

    const char* operator()(const Table& table, void* stream, Parameters... parameters) const {
        if (error_) return error_;
        return launch(kernel_, std::min(blocks_, table.chunks()), threads_, stream, table, parameters...);
    }

private:
    void (*kernel_)(Table, Parameters...);
    int threads_;
    int64_t blocks_ = 0;
    const char* error_ = nullptr;
};

// f(K as a type) for few clusters, or `many`.
template <class F, class Kernel>
Kernel with_few(int64_t K, F f, Kernel many) {
    switch (K) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        case 8: return f(std::integral_constant<int, 8>{});
        default: return many;
    }
}

template <class T>
GramKernel gram_kernel_for(int64_t K) {
    return with_few(K, [](auto few) { return gram_kernel<T, decltype(few)::value>; }, GramKernel{gram_tiled_kernel<T>});
}

template <class T>
CombineKernel weighted_sum_kernel_for(int64_t K) {
    return with_few(K, [](auto few) { return weighted_sum_kernel<T, decltype(few)::value>; },
                    CombineKernel{weighted_sum_kernel<T, 8>});
}

struct Combine {
    CombineKernel kernel;
    int columns;  // per thread
};

template <class T>
Combine combine_kernel_for(int64_t K) {
    if (K <= 8) return {combine_kernel<T, 8>, kCombineColumns<T, 8>};
    if (K <= 16) return {combine_kernel<T, 16>, kCombineColumns<T, 16>};
    if (K <= 32) return {combine_kernel<T, 32>, kCombineColumns<T, 32>};
    return {combine_kernel<T, 64>, kCombineColumns<T, 64>};
}

// f(an element of the gradients' type), or `otherwise`.
template <class F, class R>
R with_element(Type type, F f, R otherwise) {
    switch (type) {
        case Type::f32: return f(float{});
        case Type::bf16: return f(__nv_bfloat16{});
        case Type::f16: return f(__half{});
        default: return otherwise;
    }
}

// Columns of a chunk. Long ones keep the partial sums far below a hundredth of the gradients' bytes; shorter ones keep
// the whole device busy on small gradients.
int64_t gram_columns(const Gradients& g) {
    const int64_t total = std::accumulate(g.sizes, g.sizes + g.segments, int64_t{0});
    const int64_t longest = g.K <= kFewClusters ? 16384 : 1024 * g.K, whole = 2048;
    const int64_t columns = std::min(std::max(total / 1024, longest / 4), longest);
    return (columns + whole - 1) / whole * whole;
}

int64_t gram_chunks(const Gradients& g) {
    const int64_t columns = gram_columns(g);
    return std::accumulate(g.sizes, g.sizes + g.segments, int64_t{0},
                           [=](int64_t chunks, int64_t size) { return chunks + chunks_of(size, columns); });
}

}  // namespace

int64_t gram_workspace(const Gradients& g) { return pairs_of(static_cast<int>(g.K)) * gram_chunks(g); }

const char* gram(const Gradients& g, double* out, double* workspace, void* stream) {
    const int K = static_cast<int>(g.K);
    const GramKernel kernel =
        with_element(g.type, [=](auto element) { return gram_kernel_for<decltype(element)>(K); }, GramKernel{});
    if (!kernel) return kDtypes;
    const ChunkedKernel<Partials> chunked(kernel, K <= kFewClusters ? kGramThreads : kTiledThreads);
    Partials partials{workspace, gram_chunks(g), 0};
    const char* error = for_each_table(g, nullptr, gram_columns(g), [&](const Table& table) {
        const char* failed = chunked(table, stream, partials);
        partials.before += table.chunks();
        return failed;
    });
    if (error) return error;
    const double* sums = workspace;
    return launch(sum_partials_kernel, pairs_of(K), kGramThreads, stream, K, sums, partials.chunks, out);
}

const char* pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients,
                                void* stream) {
    return launch(coefficients_kernel, K, 32, stream, static_cast<int>(K), gram, order, coefficients);
}

const char* combine(const Gradients& g, const double* coefficients, void* stream) {
    const Combine chosen =
        with_element(g.type, [&](auto element) { return combine_kernel_for<decltype(element)>(g.K); }, Combine{});
    if (!chosen.kernel) return kDtypes;
    const ChunkedKernel<const double*> chunked(chosen.kernel, kCombineThreads);
    return for_each_table(g, nullptr, chosen.columns * kCombineThreads,
                          [&](const Table& table) { return chunked(table, stream, coefficients); });
}

const char* weighted_sum(const Gradients& g, const double* weights, void* const* out, void* stream) {
    const CombineKernel kernel = with_element(
        g.type, [&](auto element) { return weighted_sum_kernel_for<decltype(element)>(g.K); }, CombineKernel{});
    if (!kernel) return kDtypes;
    const int columns = g.type == Type::f32 ? kVector<float> : kVector<__half>;
    const ChunkedKernel<const double*> chunked(kernel, kCombineThreads);
    return for_each_table(g, out, columns * kCombineThreads,
                          [&](const Table& table) { return chunked(table, stream, weights); });
}

const char* unsupported() {
    thread_local char why[512];
    int device = 0, driver = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) {
        message(error);
        std::snprintf(why, sizeof why,
                      "the NVIDIA driver supports CUDA up to %d.%d, but the extension was built with CUDA %d.%d; update "
                      "the driver, or install this package again with an older nvcc",
                      driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
        return why;
    }
    if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
        message(error);
        return "there is no NVIDIA GPU, or its driver is not installed";
    }
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess && major < 8) {
        std::snprintf(why, sizeof why,
                      "the device's compute capability is %d.%d, and the kernels of gradient surgery need 8.0 (Ampere) "
                      "or higher",
                      major, minor);
        return why;
    }
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, coefficients_kernel);
    if (error == cudaSuccess) return nullptr;
    const char* what = message(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion)
        std::snprintf(why, sizeof why,
                      "the extension holds no code for the device's compute capability %d.%d; set "
                      "TORCH_CUDA_ARCH_LIST=%d.%d and install this package again (pip install --force-reinstall "
                      "--no-deps)",
                      major, minor, major, minor);
    else
        std::snprintf(why, sizeof why, "the CUDA runtime reports: %s", what);
    return why;
}

}  // namespace dtr::cuda
