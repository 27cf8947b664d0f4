// CUDA's runtime as far as the kernels use it, on a CPU: every CUDA thread is a fiber, and fibers change at barriers
// and shuffles, in a fixed order. A launch runs to its end before it returns. It returns an error, with a sentence,
// where threads wait for others that never come, or meet at different places in the source.
//
// Choices that the hardware leaves open are made to do harm: shared memory starts as NaN in every block. Asynchronous
// copies happen as late as allowed or, with backward = true, as early, the threads then running in the opposite order.
#pragma once
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // so that all of it lies in one stretch of memory
#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
};
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace shim {

struct Device {
    int processors = 3, major = 9, minor = 0, driver = CUDART_VERSION;
    cudaError_t present = cudaSuccess, has_code = cudaSuccess;
    bool backward = false;
};
inline Device device;
inline std::string failure;             // of the last launch
inline cudaError_t last = cudaSuccess;  // the error that cudaGetLastError forgets

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Thread {
    enum State { running, at_barrier, at_shuffle, done } state = done;
    int line = 0;  // of the source, where it waits
    jmp_buf registers;
    std::unique_ptr<char[]> stack;
    uint64_t offered[2];  // to the warp's shuffle; of the next one while others still read the last
    int shuffles = 0;
    std::deque<std::vector<Copy>> copies;  // by commit, the last not committed yet
};

inline std::vector<Thread> threads;  // of the largest block so far; blockDim.x of them run
inline Thread* current;
inline std::function<void()> kernel;
inline jmp_buf scheduler;
inline thread_local char shared_marker;

// Back to the scheduler until it resumes this thread.
inline void wait(Thread::State state, int line) {
    current->state = state;
    current->line = line;
    if (!_setjmp(current->registers)) _longjmp(scheduler, 1);
}

inline void fiber() {
    for (;;) {
        wait(Thread::done, 0);
        kernel();
    }
}

inline void resume(size_t t) {
    current = &threads[t];
    threadIdx = dim3(static_cast<unsigned>(t));
    if (!_setjmp(scheduler)) _longjmp(current->registers, 1);
}

inline void create_thread() {
    constexpr size_t kStack = 256 << 10;
    current = &threads.emplace_back();
    current->stack.reset(new char[kStack]);
    ucontext_t context, back;
    getcontext(&context);
    context.uc_stack.ss_sp = current->stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, fiber, 0);
    if (!_setjmp(scheduler)) swapcontext(&back, &context);
}

inline int poison(dl_phdr_info* library, size_t, void*) {
    for (int n = 0; n < library->dlpi_phnum; ++n) {
        char* memory = static_cast<char*>(library->dlpi_tls_data);
        const size_t bytes = library->dlpi_phdr[n].p_memsz;
        if (library->dlpi_phdr[n].p_type == PT_TLS && memory <= &shared_marker && &shared_marker < memory + bytes)
            std::memset(memory, 0xff, bytes);
    }
    return 0;
}

// Lets the waiting threads [first, last) go if all of them have come to the same place; those that ended do not count.
inline bool meet(size_t first, size_t last, Thread::State place) {
    const Thread* one = nullptr;
    for (size_t t = first; t < last; ++t) {
        const Thread& thread = threads[t];
        if (thread.state == Thread::done && place == Thread::at_barrier) continue;
        if (thread.state != place || (one && one->line != thread.line)) return false;
        one = &thread;
    }
    for (size_t t = first; t < last; ++t)
        if (threads[t].state == place) threads[t].state = Thread::running;
    return one;
}

// Null, or which thread waits in vain.
inline const Thread* run_block() {
    dl_iterate_phdr(poison, nullptr);
    const size_t number = blockDim.x;
    for (size_t t = 0; t < number; ++t) {
        threads[t].state = Thread::running;
        threads[t].copies.assign(1, {});
    }
    for (;;) {
        for (size_t t = 0; t < number; ++t) {
            const size_t next = device.backward ? number - 1 - t : t;
            if (threads[next].state == Thread::running) resume(next);
        }
        bool moved = meet(0, number, Thread::at_barrier);
        for (size_t t = 0; t < number; t += 32) moved |= meet(t, t + 32, Thread::at_shuffle);
        if (moved) continue;
        for (size_t t = 0; t < number; ++t)
            if (threads[t].state != Thread::done) return &threads[t];
        return nullptr;
    }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> call) {
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    if (!gridDim.x || gridDim.x > 0x7fffffff || !blockDim.x || blockDim.x % 32 || blockDim.x > 1024)
        return last = cudaErrorInvalidConfiguration;
    kernel = std::move(call);
    while (threads.size() < blockDim.x) create_thread();
    for (blockIdx = dim3(0); blockIdx.x < gridDim.x; ++blockIdx.x)
        if (const Thread* waiting = run_block()) {
            failure = "thread " + std::to_string(waiting - threads.data()) + " waits at line " +
                      std::to_string(waiting->line) + " for others that are elsewhere";
            threads.clear();
            return last = cudaErrorLaunchFailure;
        }
    return cudaSuccess;
}

// Returns the value that lane `from` of the warp offers in the same shuffle.
template <class T>
T exchange(unsigned mask, T value, unsigned from, int line) {
    if (mask != ~0u) std::abort();  // only whole warps are simulated
    const int parity = current->shuffles++ % 2;
    std::memcpy(&current->offered[parity], &value, sizeof value);
    wait(Thread::at_shuffle, line);
    std::memcpy(&value, &threads[threadIdx.x / 32 * 32 + from % 32].offered[parity], sizeof value);
    return value;
}

}  // namespace shim

inline void __syncthreads(int line = __builtin_LINE()) { shim::wait(shim::Thread::at_barrier, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
    return shim::exchange(mask, value, lane, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
    return shim::exchange(mask, value, threadIdx.x ^ lanes, line);
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
    for (int lanes = 1; lanes < 32; lanes *= 2) value |= __shfl_xor_sync(mask, value, lanes, line);
    return value;
}

inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    return shim::launch(*config, [=] { kernel(arguments...); });
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return shim::last = shim::device.has_code;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return shim::last = shim::device.present;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = shim::device.driver;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? shim::device.processors
             : attribute == cudaDevAttrComputeCapabilityMajor ? shim::device.major
                                                              : shim::device.minor;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(shim::last, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? shim::failure.c_str() : "the simulated device reports an error";
}
