// dtr_kernels._C: a thin pybind11 module over plain pointers. It links neither libtorch nor an OpenMP runtime: the
// process's own, which PyTorch has loaded, serves both, so that the two share one pool of threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_config.h"  // written by dtr_kernels/compilation.py
#include "checks.h"
#include "cpu/kernels.h"
#include "gather.h"
#include "surgery.h"

namespace py = pybind11;
using namespace dtr;

// Tuples, no objects: pybind11 enters each object into a table, and where memory for that is short it ends the process.
namespace pybind11::detail {
template <>
struct type_caster<Rows> {
    PYBIND11_TYPE_CASTER(Rows, const_name("tuple[int, Type, int]"));
    bool load(handle source, bool convert) {
        using Fields = std::tuple<uintptr_t, Type, int64_t>;
        make_caster<Fields> loaded;
        if (!loaded.load(source, convert)) return false;
        const auto [data, type, stride] = cast_op<Fields>(std::move(loaded));
        value = {reinterpret_cast<void*>(data), type, stride};
        return true;
    }
};
template <>
struct type_caster<Shape> {
    PYBIND11_TYPE_CASTER(Shape, const_name("tuple[int, int, int, int, int, int]"));
    bool load(handle source, bool convert) {
        using Fields = std::tuple<int64_t, int64_t, int64_t, uintptr_t, int64_t, int64_t>;
        make_caster<Fields> loaded;
        if (!loaded.load(source, convert)) return false;
        const auto [B, N, C, start, width, chunk] = cast_op<Fields>(std::move(loaded));
        value = {B, N, C, reinterpret_cast<const int32_t*>(start), width, chunk};
        return true;
    }
};
}  // namespace pybind11::detail

namespace {

struct InstructionSet {
    const Kernels& kernels;
    const SurgeryKernels& surgery;
};

// The instruction sets that this processor runs, the best first.
std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets.push_back({avx512_kernels, avx512_surgery});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back({avx2_kernels, avx2_surgery});
#endif
    sets.push_back({baseline_kernels, baseline_surgery});
    return sets;
}

// The one that the environment variable DTR_ISA names, or the best.
InstructionSet choose() {
    const std::vector<InstructionSet> sets = instruction_sets();
    const char* asked = std::getenv("DTR_ISA");
    if (!asked || !*asked) return sets.front();
    std::string names;
    for (const InstructionSet& set : sets) {
        if (set.kernels.isa == std::string(asked)) return set;
        names += std::string(" ") + set.kernels.isa;
    }
    throw py::value_error("DTR_ISA=" + std::string(asked) + " is none of the instruction sets that run here:" + names);
}

const InstructionSet& chosen() {
    static const InstructionSet set = choose();
    return set;
}

const Kernels& kernels() { return chosen().kernels; }

template <class Args>
void run(void (*kernel)(const Args&), const Args& args) {
    if (!has_work(args)) return;
    check(args);
    py::gil_scoped_release unlocked;
    kernel(args);
}

template <class T>
T* address(uintptr_t pointer) {
    return reinterpret_cast<T*>(pointer);
}

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

// Calls share nothing but constants, and kernels run without the lock anyway: free-threaded Python needs none.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Compiled kernels of dtr_kernels.";
    py::enum_<Type>(m, "Type").value("f32", Type::f32).value("f64", Type::f64).value("bf16", Type::bf16).value("f16", Type::f16);

    m.def("norm_forward", [](Shape shape, double eps, bool compact, bool keep_branch, bool rms, Type stream_type, Rows x, Rows branch,
                             Rows stream, Rows u, Rows gate, Rows shift, Rows scale, Rows mean, Rows rstd) {
        run(kernels().norm_forward, NormForward{shape, x, branch, stream, u, gate, shift, scale, mean, rstd, eps, compact, keep_branch,
                                                rms, stream_type});
    });
    m.def("norm_backward", [](Shape shape, bool compact, bool keep_branch, bool rms, bool x_is_stream, Rows du, Rows dstream, Rows x,
                              Rows branch, Rows dx, Rows dbranch, Rows gate, Rows scale, Rows mean, Rows rstd, Rows inactive, Rows sums) {
        run(kernels().norm_backward, NormBackward{shape, du, dstream, x, branch, dx, dbranch, gate, scale, mean, rstd, inactive, sums,
                                                  compact, keep_branch, rms, x_is_stream});
    });
    m.def("residual_forward", [](Shape shape, Rows x, Rows branch, Rows out, Rows gate) {
        run(kernels().residual_forward, ResidualForward{shape, x, branch, out, gate});
    });
    m.def("residual_backward", [](Shape shape, Rows dout, Rows branch, Rows dbranch, Rows gate, Rows sums) {
        run(kernels().residual_backward, ResidualBackward{shape, dout, branch, dbranch, gate, sums});
    });
    m.def("activation", [](const std::string& kind, int64_t rows, int64_t width, Rows pre, Rows act, Rows dact, Rows dpre) {
        run(kernels().activation, ActivationPass{activation_named(kind), rows, width, pre, act, dact, dpre});
    });

    // Without a constructor: where memory is short, what pybind11 does after one would end the process.
    py::class_<OwnedGradients>(m, "Gradients")
        .def_static("at", [](Type type, int64_t clusters, const std::vector<uintptr_t>& pointers, std::vector<int64_t> sizes) {
            return OwnedGradients(type, clusters, pointers, std::move(sizes));
        }, py::arg("type"), py::arg("clusters"), py::arg("pointers"), py::arg("sizes"))
        .def_static("of", gathered, py::arg("rows"), py::arg("tensor"), py::arg("parameter"))
        .def_property_readonly("sizes", &OwnedGradients::sizes);
    m.def("gram", [](const OwnedGradients& gradients, uintptr_t out) {
        gradients.check_gram(address<double>(out));
        py::gil_scoped_release unlocked;
        chosen().surgery.gram(gradients.view(), address<double>(out));
    });
    m.def("combine", [](const OwnedGradients& gradients, uintptr_t coefficients) {
        gradients.check_combine(address<double>(coefficients));
        py::gil_scoped_release unlocked;
        chosen().surgery.combine(gradients.view(), address<double>(coefficients));
    });
    m.def("weighted_sum", [](const OwnedGradients& gradients, uintptr_t weights, const std::vector<uintptr_t>& out_pointers) {
        const std::vector<void*> out = gradients.check_weighted_sum(address<double>(weights), out_pointers);
        py::gil_scoped_release unlocked;
        chosen().surgery.weighted_sum(gradients.view(), address<double>(weights), out.data());
    });
    m.def("pcgrad_coefficients", [](int64_t clusters, uintptr_t gram, uintptr_t order, uintptr_t out) {
        check_pcgrad(clusters, address<double>(gram), address<int64_t>(order), address<double>(out));
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
        gradients.check_gram(address<double>(out), address<double>(workspace), cuda::gram_workspace(gradients.view()));
        queue([&] { return cuda::gram(gradients.view(), address<double>(out), address<double>(workspace), address<void>(stream)); });
    });
    gpu.def("pcgrad_coefficients", [](int64_t clusters, uintptr_t gram, uintptr_t order, uintptr_t out, uintptr_t stream) {
        check_pcgrad(clusters, address<double>(gram), address<int64_t>(order), address<double>(out));
        queue([&] {
            return cuda::pcgrad_coefficients(clusters, address<double>(gram), address<int64_t>(order), address<double>(out),
                                             address<void>(stream));
        });
    });
    gpu.def("combine", [](const OwnedGradients& gradients, uintptr_t coefficients, uintptr_t stream) {
        gradients.check_combine(address<double>(coefficients));
        queue([&] { return cuda::combine(gradients.view(), address<double>(coefficients), address<void>(stream)); });
    });
    gpu.def("weighted_sum", [](const OwnedGradients& gradients, uintptr_t weights, const std::vector<uintptr_t>& out_pointers,
                               uintptr_t stream) {
        const std::vector<void*> out = gradients.check_weighted_sum(address<double>(weights), out_pointers);
        queue([&] { return cuda::weighted_sum(gradients.view(), address<double>(weights), out.data(), address<void>(stream)); });
    });
    gpu.def("unsupported", [] {
        py::gil_scoped_release unlocked;
        return cuda::unsupported();
    });
#endif
}
