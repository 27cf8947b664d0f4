"""The CUDA kernels of gradient surgery without a GPU.

Their source is compiled for the CPU (cuda_shim) and computes what the oracle does, to the same bits with any number of
multiprocessors and threads in any order. test_static.py reads what nvcc makes of it.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import random_order

TESTS = Path(__file__).parent
TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CLUSTERS = [1, 2, 3, 5, 8, 9, 13, 16, 33, 64]
pytestmark = pytest.mark.usefixtures("one_thread")


def bits(x: Tensor) -> Tensor:
    return x.view(BITS[x.element_size()])


def assert_same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b)), f"{(bits(a) != bits(b)).sum()} of {a.numel()} differ"


class Memory:
    """Tensors as a GPU's memory would hold them: each at a multiple of 64 bytes plus `shift` elements, or packed with
    one element between them; NaN around them, where no kernel may write and from where none may read."""

    def __init__(self, tensors: list[Tensor], shift: int = 0, packed: bool = False):
        line = 64 // tensors[0].element_size()
        starts, end = [], line + shift
        for tensor in tensors:
            starts.append(end)
            end += tensor.numel() + 1 if packed else (tensor.numel() // line + 2) * line
        nothing = float("nan") if tensors[0].is_floating_point() else -1
        self.all = torch.full((end + line,), nothing, dtype=tensors[0].dtype)
        assert self.all.data_ptr() % 64 == 0
        self.tensors = [self.all[start : start + x.numel()] for start, x in zip(starts, tensors, strict=True)]
        self.outside = torch.ones(len(self.all), dtype=torch.bool)
        for start, tensor in zip(starts, tensors, strict=True):
            self.all[start : start + tensor.numel()] = tensor
            self.outside[start : start + tensor.numel()] = False
        self.before = self.all.clone()

    def pointers(self) -> ctypes.Array:
        return (ctypes.c_void_p * len(self.tensors))(*[x.data_ptr() for x in self.tensors])

    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.tensors[0].data_ptr())

    def assert_unchanged(self) -> None:
        assert_same(self.all, self.before)

    def written(self) -> list[Tensor]:
        assert_same(self.all[self.outside], self.before[self.outside])
        return [x.clone() for x in self.tensors]


def nan(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class Kernels:
    """The library, called with the gradients as a list of segments [K, n]."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        for name in ("gram", "combine", "weighted_sum", "pcgrad_coefficients", "unsupported_on", "run_mistake"):
            getattr(library, name).restype = ctypes.c_char_p
        library.gram_workspace.restype = ctypes.c_int64

    def on_every_device(self, run) -> list[Tensor]:
        """Return the result of run(), after checking that its bits are the same on every device."""
        results = []
        for processors, backward in ((1, True), (2, False)):  # blocks with several chunks
            self.library.set_device(processors, backward)
            results.append(run())
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert_same(a, b)
        return results[0]

    @staticmethod
    def described(segments: list[Tensor], memory: Memory) -> tuple:
        sizes = (ctypes.c_int64 * len(segments))(*[x.shape[1] for x in segments])
        numbers = (ctypes.c_int64(n) for n in (segments[0].shape[0], len(segments)))
        return (TYPES[segments[0].dtype], *numbers, memory.pointers(), sizes)

    def gram(self, segments: list[Tensor], **where) -> Tensor:
        def run():
            gradients = Memory([row for x in segments for row in x], **where)
            arguments = self.described(segments, gradients)
            out = Memory([nan(len(segments[0]) ** 2)])
            workspace = Memory([nan(self.library.gram_workspace(*arguments))])
            assert self.library.gram(*arguments, out.pointer(), workspace.pointer()) is None
            gradients.assert_unchanged()
            workspace.written()
            return out.written()

        return self.on_every_device(run)[0].view(len(segments[0]), -1)

    def combine(self, segments: list[Tensor], C: Tensor, **where) -> list[Tensor]:
        def run():
            gradients = Memory([row for x in segments for row in x], **where)
            coefficients = Memory([C.flatten()])
            assert self.library.combine(*self.described(segments, gradients), coefficients.pointer()) is None
            coefficients.assert_unchanged()
            return gradients.written()

        rows = self.on_every_device(run)
        return [torch.stack(rows[n : n + len(C)]) for n in range(0, len(rows), len(C))]

    def weighted_sum(self, segments: list[Tensor], w: Tensor, out_shift: int = 0, **where) -> list[Tensor]:
        def run():
            gradients = Memory([row for x in segments for row in x], **where)
            weights = Memory([w])
            out = Memory([nan(x.shape[1], dtype=x.dtype) for x in segments], shift=out_shift)
            described = self.described(segments, gradients)
            assert self.library.weighted_sum(*described, weights.pointer(), out.pointers()) is None
            gradients.assert_unchanged()
            weights.assert_unchanged()
            return out.written()

        return self.on_every_device(run)

    def coefficients(self, gram: Tensor, order: Tensor) -> Tensor:
        def run():
            G, o, C = Memory([gram.flatten()]), Memory([order.flatten()]), Memory([nan(gram.numel())])
            pointers = G.pointer(), o.pointer(), C.pointer()
            assert self.library.pcgrad_coefficients(ctypes.c_int64(len(gram)), *pointers) is None
            G.assert_unchanged()
            o.assert_unchanged()
            return C.written()

        return self.on_every_device(run)[0].view_as(gram)


@pytest.fixture(scope="session")
def cuda(tmp_path_factory) -> Kernels:
    library = tmp_path_factory.mktemp("cuda") / "cuda_on_cpu.so"
    sources = [TESTS / "cuda_shim" / name for name in ("entry.cpp", "mistakes.cpp")]
    flags = "-std=c++17 -O1 -U_FORTIFY_SOURCE -fPIC -shared -Wall -Wextra -Werror -Wno-unknown-pragmas"
    flags += " -Wno-unused-but-set-variable"  # g++ overlooks uses in generic lambdas
    flags += " -fsanitize=alignment,bounds"  # of vectors and of arrays in shared memory
    command = [*os.environ.get("CXX", "g++").split(), *flags.split(), f"-I{TESTS / 'cuda_shim'}", *sources]
    done = subprocess.run([*command, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Kernels(ctypes.CDLL(str(library)))


@pytest.fixture(autouse=True)
def no_bad_access(capfd):
    yield
    said = capfd.readouterr().err
    assert "runtime error" not in said, said


def gradients(K: int, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(K, n).to(dtype) for n in sizes]


def whole(segments: list[Tensor]) -> Tensor:
    return torch.cat(segments, 1).double()


def interesting_sizes(K: int) -> list[int]:
    """Up to several chunks of the Gram matrix."""
    return {33: [1003, 10_501], 64: [7, 16_901]}.get(K, [0, 1, 7, 1003, 9_001])


def assert_gram(ours: Tensor, segments: list[Tensor]) -> None:
    g = whole(segments)
    exact = reference.gram(g)
    plain = reference.gram(g.float()).double()
    norms = exact.diagonal().sqrt()
    bound = 2 * (plain - exact).abs().max() + 1e-6 * (norms.max() ** 2)
    assert (ours - exact).abs().max() <= bound
    assert_same(ours, ours.T.contiguous())


def assert_combined(ours: Tensor, coefficients: Tensor, segments: list[Tensor]) -> None:
    g = whole(segments)
    exact = coefficients @ g
    plain = (coefficients.float() @ g.float()).to(ours.dtype).double()
    scale = (coefficients.abs() @ g.abs()).amax() if g.numel() else 0.0
    errors = [(x - exact).abs().max().item() if g.numel() else 0.0 for x in (ours.double(), plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6 * scale


@pytest.mark.parametrize("K", CLUSTERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_matches_the_oracle(cuda, seed, K, dtype):
    for size in interesting_sizes(K):
        segments = gradients(K, [size], dtype)
        assert_gram(cuda.gram(segments), segments)
        C, w = torch.randn(K, K, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
        segments = [x[:, :4003] for x in segments]
        assert_combined(cuda.combine(segments, C)[0], C, segments)
        assert_combined(cuda.weighted_sum(segments, w)[0], w, segments)


@pytest.mark.parametrize("K", [1, 3, 8, 13, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_bits_do_not_depend_on_alignment(cuda, seed, K, dtype):
    """Rows that begin anywhere, and the rows of a [K, P] buffer of odd width."""
    segments = gradients(K, [2357], dtype)
    C, w = torch.randn(K, K, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    gram, combined, summed = cuda.gram(segments), cuda.combine(segments, C)[0], cuda.weighted_sum(segments, w)[0]
    assert_gram(gram, segments)
    for where in ({"shift": 1}, {"packed": True}):
        assert_same(cuda.gram(segments, **where), gram)
        assert_same(cuda.combine(segments, C, **where)[0], combined)
        assert_same(cuda.weighted_sum(segments, w, **where)[0], summed)
    assert_same(cuda.weighted_sum(segments, w, out_shift=3)[0], summed)


@pytest.mark.parametrize("K", [2, 5, 9, 33])
@pytest.mark.parametrize("dtype", TYPES)
def test_many_segments(cuda, seed, K, dtype):
    """Empty ones, tiny ones and one that outweighs them: more than one launch takes."""
    sizes = torch.randint(0, 10, (150,)).tolist()
    sizes[77] = 4501
    segments = gradients(K, sizes, dtype)
    C, w = torch.randn(K, K, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    assert_gram(cuda.gram(segments), segments)
    assert_combined(torch.cat(cuda.combine(segments, C), 1), C, segments)
    assert_combined(torch.cat(cuda.weighted_sum(segments, w)), w, segments)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0], [0, 3, 0]])
def test_empty_segments(cuda, sizes):
    segments = gradients(5, sizes, torch.float32)
    assert_gram(cuda.gram(segments), segments)
    for x, combined in zip(segments, cuda.combine(segments, torch.eye(5).double()), strict=True):
        assert_same(x, combined)


@pytest.mark.parametrize("K", [3, 8, 9, 40])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("where", [{}, {"shift": 1}], ids=["aligned", "unaligned"])
def test_nan_and_inf_come_through_zero_coefficients(cuda, seed, K, dtype, where):
    segments = gradients(K, [2051], dtype)
    segments[0][1, 3], segments[0][2, 2050] = float("nan"), float("inf")
    for result in (
        cuda.combine(segments, torch.zeros(K, K).double(), **where)[0],
        cuda.weighted_sum(segments, torch.zeros(K).double(), **where)[0][None],
    ):
        assert result[:, [3, 2050]].isnan().all()
        result[:, [3, 2050]] = 0
        assert (result == 0).all()
    G = cuda.gram(segments, **where)
    assert G[1].isnan().all() and G[:, 1].isnan().all()
    assert not G[2].isfinite().any() and not G[:, 2].isfinite().any()
    others = [k for k in range(K) if k not in (1, 2)]
    assert G[others][:, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [2, 9])
def test_rounds_to_nearest_even(cuda, seed, K, dtype):
    """Half the sum of two is exact in fp32, so that only the rounding counts."""
    segments = gradients(K, [3001], dtype)
    expected = ((segments[0][0].float() + segments[0][1].float()) / 2).to(dtype)
    w = torch.zeros(K, dtype=torch.float64)
    w[:2] = 0.5
    assert_same(cuda.weighted_sum(segments, w)[0], expected)
    assert_same(cuda.combine(segments, w.repeat(K, 1))[0][K - 1], expected)


@pytest.mark.parametrize("K", [*CLUSTERS, 32, 63])
def test_coefficients(cuda, seed, K):
    for width in (3, 40):  # many gradients in few dimensions conflict with each other again and again
        g = torch.randn(K, width, dtype=torch.float64)
        g[K // 2] = 0.01 * g[K // 2] - g[0]  # at least these two
        G, order = reference.gram(g), random_order(K)
        C, exact = cuda.coefficients(G, order), reference.pcgrad_coefficients(G, order)
        assert (C - exact).abs().max() <= 1e-9 * exact.abs().max()
        assert K == 1 or not torch.equal(exact, torch.eye(K).double()), "the test needs conflicts"


def test_no_conflict_and_zero_gradients_change_nothing(cuda):
    order = random_order(5)
    identity = torch.eye(5, dtype=torch.float64)
    assert_same(cuda.coefficients(torch.ones(5, 5).double(), order), identity)
    assert_same(cuda.coefficients(torch.zeros(5, 5).double(), order), identity)
    G = -torch.ones(5, 5).double()  # no Gram matrix: every product is a conflict with a gradient of "norm" -1
    assert_same(cuda.coefficients(G, order), identity)


@pytest.mark.parametrize("K", [1, 2, 5, 33, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_coefficients_of_a_gram_matrix_that_is_not_finite_are_nan(cuda, seed, K, value):
    """Wherever it overflowed: a comparison with NaN is false, as if there were no conflict."""
    for i, j in ((0, 0), (K - 1, K - 1), (K // 2, K - 1)):
        G = reference.gram(torch.randn(K, 4, dtype=torch.float64))
        G[i, j] = value
        assert cuda.coefficients(G, random_order(K)).isnan().all()


@pytest.mark.parametrize("K", [2, 5, 33, 64])
def test_an_order_that_is_no_permutation_gives_a_row_of_nan(cuda, seed, K):
    G = reference.gram(torch.randn(K, 4, dtype=torch.float64))
    order = random_order(K)
    exact = reference.pcgrad_coefficients(G, order)
    row = K // 2
    wrong = [K, -1, 64, 1 << 40, -(1 << 63), (1 << 63) - 1, (1 << 32) + int(order[row, 0]), row]
    for value in wrong + ([int(order[row, 1])] if K > 2 else []):
        broken = order.clone()
        broken[row, 0] = value
        C = cuda.coefficients(G, broken)
        assert C[row].isnan().all(), value
        others = [k for k in range(K) if k != row]
        assert (C[others] - exact[others]).abs().max() <= 1e-9 * exact.abs().max()


def test_fp64_is_refused(cuda):
    described = (1, ctypes.c_int64(1), ctypes.c_int64(1), (ctypes.c_void_p * 1)(), (ctypes.c_int64 * 1)(7))
    assert b"fp32, bf16 and fp16" in cuda.library.gram(*described, None, None)
    assert b"fp32, bf16 and fp16" in cuda.library.combine(*described, None)
    assert b"fp32, bf16 and fp16" in cuda.library.weighted_sum(*described, None, (ctypes.c_void_p * 1)())


@pytest.mark.parametrize("K", [5, 8, 16, 64])
@pytest.mark.parametrize("dtype", TYPES)
def test_workspace_is_small(cuda, K, dtype):
    """DiT-XL/2, 675 million parameters, in one buffer."""
    sizes = (ctypes.c_int64 * 1)(675_129_632)
    doubles = cuda.library.gram_workspace(TYPES[dtype], ctypes.c_int64(K), ctypes.c_int64(1), None, sizes)
    assert 0 < doubles * 8 < 0.003 * K * sizes[0] * dtype.itemsize


@pytest.mark.parametrize(
    "device, sentence",
    [
        ((9, 0, 13000, 0, 0), None),
        ((7, 5, 13000, 0, 0), "compute capability is 7.5.*need 8.0"),
        ((11, 0, 13000, 0, 209), "no code for the device's compute capability 11.0; set TORCH_CUDA_ARCH_LIST=11.0"),
        ((12, 0, 13000, 0, 222), "no code for the device's compute capability 12.0"),
        ((9, 0, 12020, 35, 0), "driver supports CUDA up to 12.2.*built with CUDA 13.0; update the driver"),
        ((9, 0, 0, 35, 0), "no NVIDIA GPU, or its driver is not installed"),
        ((9, 0, 13000, 100, 0), "no NVIDIA GPU, or its driver is not installed"),
        ((9, 0, 13000, 0, 719), "the CUDA runtime reports: "),
    ],
)
def test_unsupported_says_why(cuda, device, sentence):
    why = cuda.library.unsupported_on(*device)
    assert why is None if sentence is None else re.search(sentence, why.decode())
    assert cuda.library.last_error() == 0, "a later call would report the error again"


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        ("no_mistake", None),
        ("barrier_for_some", "waits at line"),
        ("different_barriers", "waits at line"),
        ("shuffle_for_some", "waits at line"),
        ("no_barrier", "wrong result"),
        ("no_wait_for_copy", "wrong result"),
    ],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_shim_finds_mistakes(cuda, mistake, sentence, backward):
    if mistake == "no_wait_for_copy" and backward:
        sentence = None  # copies are done at once
    answer = cuda.library.run_mistake(mistake.encode(), backward)
    assert answer is None if sentence is None else sentence in answer.decode()
