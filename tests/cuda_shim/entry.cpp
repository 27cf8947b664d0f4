// The kernels for ctypes: arrays in the CPU's memory stand in for the device's.
#include "../../csrc/cuda/surgery.cu"

using dtr::Gradients;
using dtr::Type;

extern "C" {

void set_device(int processors, bool backward) {
    shim::device = {};
    shim::device.processors = processors;
    shim::device.backward = backward;
}

const char* unsupported_on(int major, int minor, int driver, int present, int has_code) {
    shim::device = {1, major, minor, driver, cudaError_t(present), cudaError_t(has_code)};
    const char* why = dtr::cuda::unsupported();
    shim::device = {};
    return why;
}

int last_error() { return cudaGetLastError(); }

int64_t gram_workspace(int type, int64_t K, int64_t segments, void** data, const int64_t* sizes) {
    return dtr::cuda::gram_workspace({Type(type), K, segments, data, sizes});
}

const char* gram(int type, int64_t K, int64_t segments, void** data, const int64_t* sizes, double* out,
                 double* workspace) {
    return dtr::cuda::gram({Type(type), K, segments, data, sizes}, out, workspace, nullptr);
}

const char* pcgrad_coefficients(int64_t K, const double* gram, const int64_t* order, double* coefficients) {
    return dtr::cuda::pcgrad_coefficients(K, gram, order, coefficients, nullptr);
}

const char* combine(int type, int64_t K, int64_t segments, void** data, const int64_t* sizes,
                    const double* coefficients) {
    return dtr::cuda::combine({Type(type), K, segments, data, sizes}, coefficients, nullptr);
}

const char* weighted_sum(int type, int64_t K, int64_t segments, void** data, const int64_t* sizes,
                         const double* weights, void** out) {
    return dtr::cuda::weighted_sum({Type(type), K, segments, data, sizes}, weights, out, nullptr);
}
}
