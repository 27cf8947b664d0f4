// dtr_kernels._C: a thin pybind11 module over plain pointers. It links neither libtorch nor an OpenMP runtime: the
// process's own, which PyTorch has loaded, serves both, so that the two share one pool of threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_config.h"  // written by setup.py
#include "cpu/kernels.h"
#include "surgery.h"

namespace py = pybind11;
using namespace dtr;

namespace {

struct InstructionSet {
    const Kernels& kernels;
    const SurgeryKernels& surgery;
};

const InstructionSet& best() {
#if defined(__x86_64__)
    static const InstructionSet chosen =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
            ? InstructionSet{avx512_kernels, avx512_surgery}
        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? InstructionSet{avx2_kernels, avx2_surgery}
                                                                          : InstructionSet{baseline_kernels, baseline_surgery};
#else
    static const InstructionSet chosen{baseline_kernels, baseline_surgery};
#endif
    return chosen;
}

const Kernels& kernels() { return best().kernels; }

template <class Args>
void run(void (*kernel)(const Args&), const Args& args) {
    py::gil_scoped_release unlocked;
    kernel(args);
}

template <class T>
T* address(uintptr_t pointer) {
    return reinterpret_cast<T*>(pointer);
}

std::vector<void*> addresses(const std::vector<uintptr_t>& pointers) {
    std::vector<void*> out;
    for (uintptr_t pointer : pointers) out.push_back(address<void>(pointer));
    return out;
}

void check_clusters(int64_t clusters) {
    if (clusters < 1 || clusters > kMaxClusters)
        throw py::value_error("clusters must be 1 to " + std::to_string(kMaxClusters) + ", got " + std::to_string(clusters));
}

// Gradients with the arrays that they point to.
struct OwnedGradients {
    Type type;
    int64_t K;
    std::vector<void*> data;
    std::vector<int64_t> sizes;

    OwnedGradients(Type type, int64_t clusters, const std::vector<uintptr_t>& pointers, std::vector<int64_t> lengths)
        : type(type), K(clusters), data(addresses(pointers)), sizes(std::move(lengths)) {
        if (type == Type::f64) throw py::value_error("type must be f32, bf16 or f16, got f64");
        check_clusters(K);
        if (data.size() != K * sizes.size())
            throw py::value_error("pointers must hold clusters * len(sizes) = " + std::to_string(K * sizes.size()) +
                                  " addresses, got " + std::to_string(data.size()));
        for (int64_t size : sizes)
            if (size < 0) throw py::value_error("sizes must not be negative, got " + std::to_string(size));
    }

    Gradients view() const { return {type, K, static_cast<int64_t>(sizes.size()), data.data(), sizes.data()}; }

    // Where a sum over the gradients goes: one address for each segment.
    std::vector<void*> targets(const std::vector<uintptr_t>& pointers) const {
        if (pointers.size() != sizes.size())
            throw py::value_error("out_pointers must hold " + std::to_string(sizes.size()) + " addresses, one for each segment, got " +
                                  std::to_string(pointers.size()));
        return addresses(pointers);
    }
};

#ifdef DTR_CUDA
// Runs a function of dtr::cuda, which returns null or what went wrong.
template <class Function>
void queue(Function function) {
    const char* error;
    {
        py::gil_scoped_release unlocked;
        error = function();
    }
    if (error) throw std::runtime_error(error);
}
#endif

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

    py::class_<OwnedGradients>(m, "Gradients")
        .def(py::init<Type, int64_t, const std::vector<uintptr_t>&, std::vector<int64_t>>(), py::arg("type"), py::arg("clusters"),
             py::arg("pointers"), py::arg("sizes"));
    m.def("gram", [](const OwnedGradients& gradients, uintptr_t out) {
        py::gil_scoped_release unlocked;
        best().surgery.gram(gradients.view(), address<double>(out));
    });
    m.def("combine", [](const OwnedGradients& gradients, uintptr_t coefficients) {
        py::gil_scoped_release unlocked;
        best().surgery.combine(gradients.view(), address<double>(coefficients));
    });
    m.def("weighted_sum", [](const OwnedGradients& gradients, uintptr_t weights, const std::vector<uintptr_t>& out_pointers) {
        const std::vector<void*> out = gradients.targets(out_pointers);
        py::gil_scoped_release unlocked;
        best().surgery.weighted_sum(gradients.view(), address<double>(weights), out.data());
    });
    m.def("pcgrad_coefficients", [](int64_t clusters, uintptr_t gram, uintptr_t order, uintptr_t out) {
        check_clusters(clusters);
        py::gil_scoped_release unlocked;
        pcgrad_coefficients(clusters, address<double>(gram), address<int64_t>(order), address<double>(out));
    });

    m.def("build_config", [] {
        py::dict config;
        config["compiler"] = __VERSION__;
        config["instruction_set"] = kernels().isa;
        config["cuda"] = kCudaVersion;
        config["architectures"] = py::str(kArchitectures).attr("split")();
        config["no_cuda_reason"] = kNoCudaReason;
        return config;
    });

#ifdef DTR_CUDA
    auto gpu = m.def_submodule("cuda", "Gradient surgery on device pointers, queued on a stream.");
    gpu.def("gram_workspace", [](const OwnedGradients& gradients) { return cuda::gram_workspace(gradients.view()); });
    gpu.def("gram", [](const OwnedGradients& gradients, uintptr_t out, uintptr_t workspace, uintptr_t stream) {
        queue([&] { return cuda::gram(gradients.view(), address<double>(out), address<double>(workspace), address<void>(stream)); });
    });
    gpu.def("pcgrad_coefficients", [](int64_t clusters, uintptr_t gram, uintptr_t order, uintptr_t out, uintptr_t stream) {
        check_clusters(clusters);
        queue([&] {
            return cuda::pcgrad_coefficients(clusters, address<double>(gram), address<int64_t>(order), address<double>(out),
                                             address<void>(stream));
        });
    });
    gpu.def("combine", [](const OwnedGradients& gradients, uintptr_t coefficients, uintptr_t stream) {
        queue([&] { return cuda::combine(gradients.view(), address<double>(coefficients), address<void>(stream)); });
    });
    gpu.def("weighted_sum", [](const OwnedGradients& gradients, uintptr_t weights, const std::vector<uintptr_t>& out_pointers,
                               uintptr_t stream) {
        const std::vector<void*> out = gradients.targets(out_pointers);
        queue([&] { return cuda::weighted_sum(gradients.view(), address<double>(weights), out.data(), address<void>(stream)); });
    });
    gpu.def("unsupported", [] {
        py::gil_scoped_release unlocked;
        return cuda::unsupported();
    });
#endif
}
