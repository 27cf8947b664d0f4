// dtr_kernels._C: a thin pybind11 module over plain pointers. It links neither libtorch nor an OpenMP runtime: the
// process's own, which PyTorch has loaded, serves both, so that the two share one pool of threads.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace dtr;

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
    static const Kernels& chosen =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
            ? avx512_kernels
        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels
                                                                          : baseline_kernels;
    return chosen;
#else
    return baseline_kernels;
#endif
}

template <class Args>
void run(void (*kernel)(const Args&), const Args& args) {
    py::gil_scoped_release unlocked;
    kernel(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of dtr_kernels.";
    py::enum_<Type>(m, "Type").value("f32", Type::f32).value("f64", Type::f64).value("bf16", Type::bf16).value("f16", Type::f16);
    py::class_<Rows>(m, "Rows").def(py::init([](uintptr_t data, Type type, int64_t stride) {
        return Rows{reinterpret_cast<void*>(data), type, stride};
    }));
    py::class_<Shape>(m, "Shape").def(py::init([](int64_t B, int64_t N, int64_t C, uintptr_t start, int64_t width, int64_t chunk) {
        const auto* first = reinterpret_cast<const int32_t*>(start);
        for (int64_t b = 0; first && b < B; ++b)
            if (first[b] < 0 || first[b] > C - width)
                throw py::value_error("window.start must be in 0.." + std::to_string(C - width) + " (channels - width), got " +
                                      std::to_string(first[b]) + " for sample " + std::to_string(b));
        return Shape{B, N, C, first, width, chunk};
    }));

    m.def("norm_forward", [](Shape shape, double eps, bool keep_branch, Type stream_type, Rows x, Rows branch, Rows stream, Rows u,
                             Rows gate, Rows shift, Rows scale, Rows mean, Rows rstd) {
        run(kernels().norm_forward, NormForward{shape, x, branch, stream, u, gate, shift, scale, mean, rstd, eps, keep_branch, stream_type});
    });
    m.def("norm_backward", [](Shape shape, bool keep_branch, bool x_is_stream, Rows du, Rows dstream, Rows x, Rows branch, Rows dx,
                              Rows dbranch, Rows gate, Rows scale, Rows mean, Rows rstd, Rows inactive, Rows sums) {
        run(kernels().norm_backward, NormBackward{shape, du, dstream, x, branch, dx, dbranch, gate, scale, mean, rstd, inactive, sums,
                                                  keep_branch, x_is_stream});
    });
    m.def("expand", [](Shape shape, Rows u, Rows dense, Rows mean_rstd, Rows factor, Rows shift) {
        run(kernels().expand, Expand{shape, u, dense, mean_rstd, factor, shift});
    });
    m.def("split", [](Shape shape, Rows ddense, Rows du, Rows mean_rstd, Rows factor, Rows inactive, Rows sums) {
        run(kernels().split, Split{shape, ddense, du, mean_rstd, factor, inactive, sums});
    });
    m.def("residual_forward", [](Shape shape, Rows x, Rows branch, Rows out, Rows gate) {
        run(kernels().residual_forward, ResidualForward{shape, x, branch, out, gate});
    });
    m.def("residual_backward", [](Shape shape, Rows dout, Rows branch, Rows dbranch, Rows gate, Rows sums) {
        run(kernels().residual_backward, ResidualBackward{shape, dout, branch, dbranch, gate, sums});
    });
    m.def("gelu", [](int64_t size, Rows pre, Rows act, Rows dact, Rows dpre) {
        run(kernels().gelu, Gelu{size, pre, act, dact, dpre});
    });
    m.def("build_config", [] {
        py::dict config;
        config["compiler"] = __VERSION__;
        config["instruction_set"] = kernels().isa;
        return config;
    });
}
