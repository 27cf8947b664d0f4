// Kernels with the mistakes that the shim is there to find. Each should leave 63 - i in out[i].
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>

namespace {

constexpr int kThreads = 64;

void reversed(float* out, bool with_barrier) {
    __shared__ float shared[kThreads];
    const int thread = threadIdx.x;
    shared[thread] = static_cast<float>(thread);
    if (with_barrier) __syncthreads();
    out[thread] = shared[kThreads - 1 - thread];
}

void no_mistake(float* out) { reversed(out, true); }
void no_barrier(float* out) { reversed(out, false); }

void barrier_for_some(float* out) {
    if (threadIdx.x % 2) __syncthreads();
    __shfl_sync(~0u, 0, 0);
    reversed(out, true);
}

void different_barriers(float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    reversed(out, true);
}

void shuffle_for_some(float* out) {
    if (threadIdx.x != 5) __shfl_sync(~0u, 0, 0);
    reversed(out, true);
}

void no_wait_for_copy(float* out) {
    __shared__ float shared[kThreads];
    const float number = static_cast<float>(threadIdx.x);
    __pipeline_memcpy_async(&shared[threadIdx.x], &number, 4);
    __pipeline_commit();
    __syncthreads();
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

const std::map<std::string, void (*)(float*)> kernels = {
    {"no_mistake", no_mistake},
    {"no_barrier", no_barrier},
    {"barrier_for_some", barrier_for_some},
    {"different_barriers", different_barriers},
    {"shuffle_for_some", shuffle_for_some},
    {"no_wait_for_copy", no_wait_for_copy},
};

}  // namespace

// Null, or what the shim or the result says.
extern "C" const char* run_mistake(const char* name, bool backward) {
    shim::device.backward = backward;
    float out[kThreads] = {};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    float* pointer = out;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernels.at(name), pointer);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    for (int n = 0; n < kThreads; ++n)
        if (out[n] != static_cast<float>(kThreads - 1 - n)) return "wrong result";
    return nullptr;
}
