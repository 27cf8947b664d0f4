"""The ops of gradient surgery against the loops of dtr_kernels.reference in fp64.

Every test of the ops runs on each path: PyTorch ops ("plain") and the compiled extension, on a CPU and on a GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gpu_waits import waiting_is_an_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from dtr_kernels import ops, reference
from dtr_kernels.ops import gradient_lists

OPS = torch.ops.dtr_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPILED_DTYPES = DTYPES[:3]

# (K, P): every edge of the kernels' tiles and blocks, P without factors in common with them.
SIZES = [
    *itertools.product([1, 2, 3, 5, 8, 9, 17], [1, 7, 255, 1003]),
    *[(33, 1), (64, 7), (64, 1003), (17, 8209)],
    *itertools.product([1, 5, 8], [70_001]),
    (2, 300_001),
]
# The constant of every error bound, in rounding units of what the kernels compute in.
SLACK = 16
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["plain", "compiled"])
def path(request, device, monkeypatch):
    """Which implementation runs on ``device``: "plain", or its kernels, "cpu" or "cuda"."""
    if request.param == "plain":
        monkeypatch.setattr(gradient_lists, "_unavailable", lambda device, dtype: "the test asks for it")
    chosen = gradient_lists.choose_surgery(device, torch.float32).path
    assert chosen == ("plain" if request.param == "plain" else device.type)
    return chosen


# --- gradients and error bounds --------------------------------------------------------------------------------------


def conflicting(K, P):
    """K gradients in fp64 of norm about 1: they lie near three directions, so that many pairs conflict strongly."""
    return (torch.randn(K, 3) @ torch.randn(3, P) + 0.3 * torch.randn(K, P)).double() / math.sqrt(max(P, 1) * 3)


def gradients(K, P, dtype, device):
    return conflicting(K, P).to(device, dtype)


def magnitudes(dtype):
    """Decimal exponents of the smallest and largest gradients to test; all of their products are fp32 numbers."""
    return (-5, 3) if dtype == torch.float16 else (-12, 12)


def scaled_rows(K, P, dtype):
    low, high = magnitudes(dtype)
    return conflicting(K, P) * torch.logspace(low, high, K).double()[torch.randperm(K), None]


def with_zero_rows(K, P, dtype):
    grads = conflicting(K, P)
    grads[::2] = 0
    return grads


SPECIAL = {
    "parallel": lambda K, P, dtype: torch.rand(K, 1).double() @ conflicting(1, P),
    "identical": lambda K, P, dtype: conflicting(1, P).repeat(K, 1),
    "opposite": lambda K, P, dtype: conflicting(1, P) * (1 - 2 * (torch.arange(K) % 2))[:, None],
    "opposite at other scales": lambda K, P, dtype: torch.randn(K, 1).double() @ conflicting(1, P),
    "zero rows": with_zero_rows,
    "all zero": lambda K, P, dtype: torch.zeros(K, P).double(),
    "tiny": lambda K, P, dtype: conflicting(K, P) * 10.0 ** magnitudes(dtype)[0],
    "large": lambda K, P, dtype: conflicting(K, P) * 10.0 ** magnitudes(dtype)[1],
    "rows of every magnitude": scaled_rows,
    "one element each": lambda K, P, dtype: torch.eye(K, P).double() - torch.eye(P).roll(1, 0)[:K, :P].double(),
}


def assert_close(got, exact, scale, dtype):
    """Rounded once to its dtype, and otherwise computed in fp32 (fp64 for fp64) on terms as large as ``scale``."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (got.double() - exact).abs()
    assert got.shape == exact.shape and got.dtype == dtype
    slack = SLACK * (4 if dtype == torch.float64 else 1)  # there ``exact`` is rounded as much as what is compared
    excess = error - (1 + 1e-3) * rounding - slack * unit * scale
    assert (excess <= 0).all(), f"error {error.max():.2e}, above its bound by {excess.max():.2e}"


def assert_not_worse(got, exact, plain, largest):
    """At most twice the error that plain PyTorch makes in the same dtype, and a few units of the largest value."""
    if plain.dtype == torch.float64:  # the plain computation is the exact one
        return
    slack = (8 if plain.dtype == torch.float32 else 2) * torch.finfo(plain.dtype).eps
    error, plain_error = ((t.double() - exact).abs().max() for t in (got, plain))
    plain_error.nan_to_num_(nan=0.0)  # where the square of a small gradient is 0 in fp16, and is divided by
    assert error <= 2 * plain_error + slack * largest.double().abs().max()


class Expected:
    """The exact result of PCGrad in fp64, and the size of the terms that it sums.

    A projected gradient is a sum of terms C[i, j] g_j. An error in a Gram matrix moves it along the other gradients,
    by a part of its own norm.
    """

    def __init__(self, grads, order):
        wide = grads.double()
        self.gram = reference.gram(wide)
        self.norms = self.gram.diagonal().sqrt()
        self.projected = reference.pcgrad(wide, order)
        C = reference.pcgrad_coefficients(self.gram, order)
        directions = wide.abs().amax(1) / self.norms.clamp_min(torch.finfo(torch.float64).tiny)
        terms = (C.abs() @ wide.abs()).amax(1, keepdim=True)
        self.scale = torch.maximum(terms, directions.max() * self.norms[:, None])
        self.terms_of_sum = C.sum(0).abs() @ wide.abs()

    def check(self, grads, order):
        """The ops on these gradients, a tensor or lists of tensors, which are then projected; return their sum."""
        gram, update = ops.gram(grads), ops.pcgrad_sum(grads, order)
        dtype = (update if isinstance(update, torch.Tensor) else update[0]).dtype
        assert gram.dtype == torch.float64
        assert ((gram - self.gram).abs() <= 1e-6 * self.norms * self.norms[:, None]).all()
        self.check_sum(update, dtype)
        assert ops.pcgrad_(grads, order) is None
        self.check_projected(grads, dtype)
        return update

    def check_projected(self, got, dtype):
        assert_close(torch.stack([flattened(row) for row in got]), self.projected, self.scale, dtype)

    def check_sum(self, got, dtype):
        assert_close(flattened(got), self.projected.sum(0), self.scale.sum(), dtype)


def flattened(gradient):
    """One tensor, or a list of them, as one vector in the order of memory."""
    tensors = [gradient] if isinstance(gradient, torch.Tensor) else gradient
    return torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, P", SIZES)
def test_every_op_at_every_size(seed, path, device, K, P, dtype):
    grads, order = gradients(K, P, dtype, device), ops.random_order(K)
    expected, projected = Expected(grads, order), grads.clone()
    update = expected.check(projected, order)
    plain = reference.pcgrad(grads, order)
    assert_not_worse(ops.gram(grads), expected.gram, reference.gram(grads), expected.gram)
    assert_not_worse(projected, expected.projected, plain, grads)
    assert_not_worse(update, expected.projected.sum(0), plain.sum(0), expected.terms_of_sum)

    coefficients = torch.randn(K + 1, K, device=device)
    exact = coefficients.double() @ grads.double()
    scale = (coefficients.abs() @ grads.abs().float()).amax(1, keepdim=True)
    plain = coefficients.to(dtype) @ grads
    total = ops.weighted_sum(grads, coefficients[K])
    combined = grads.clone()
    ops.combine_(combined, coefficients[:K])
    for got, rows in ((combined, slice(K)), (total, K)):
        assert_close(got, exact[rows], scale[rows], dtype)
        assert_not_worse(got, exact[rows], plain[rows], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 5, 64])
def test_gradients_without_elements(path, device, K, dtype):
    grads = torch.empty(K, 0, dtype=dtype, device=device)
    assert torch.equal(ops.gram(grads), torch.zeros(K, K, dtype=torch.float64, device=device))
    ops.pcgrad_(grads)
    ops.combine_(grads, torch.ones(K, K, device=device))
    for total in (ops.pcgrad_sum(grads), ops.weighted_sum(grads, torch.ones(K, device=device))):
        assert total.shape == (0,) and total.dtype == dtype


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_so_many_elements_that_blocks_grow(seed, path, device, dtype):
    """The error of the Gram matrix does not grow with P."""
    grads = torch.randn(2, 4_300_001, device=device).to(dtype)
    wide = grads.double()
    expected, norms = wide @ wide.T, wide.norm(dim=1)
    assert ((ops.gram(grads) - expected).abs() <= 1e-6 * norms * norms[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("K, P", [(2, 7), (5, 1003), (9, 70)])
def test_special_gradients(seed, path, device, kind, K, P, dtype):
    grads, order = SPECIAL[kind](K, P, dtype).to(device, dtype), ops.random_order(K)
    Expected(grads, order).check(grads, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_without_conflict_stay_the_same_bits(seed, path, device, dtype):
    grads = torch.rand(5, 1003, device=device).to(dtype)
    before = grads.clone()
    ops.pcgrad_(grads)
    assert torch.equal(grads, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_result_beyond_the_largest_number_is_infinite(path, device, dtype):
    grads = torch.full((2, 9), torch.finfo(dtype).max, dtype=dtype, device=device)
    assert ops.weighted_sum(grads, torch.ones(2, device=device)).isposinf().all()
    ops.combine_(grads, -torch.ones(2, 2, device=device))
    assert grads.isneginf().all()


# --- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("P", [1, 3, 500])
def test_coefficients(seed, path, device, K, P):
    """In units of |g_i| / |g_j|: also those of a gradient that is far larger or smaller than the others."""
    gram, order = reference.gram(scaled_rows(K, P, torch.float64)), ops.random_order(K)
    expected = reference.pcgrad_coefficients(gram, order)
    got = ops.pcgrad_coefficients(gram.to(device), order)
    assert got.dtype == torch.float64 and got.device.type == device.type
    norms = gram.diagonal().sqrt()
    torch.testing.assert_close(
        got.cpu() * norms / norms[:, None], expected * norms / norms[:, None], rtol=0, atol=1e-10
    )


def test_a_norm_that_underflowed_to_zero_is_not_divided_by(path, device):
    gram = torch.tensor([[1.0, -1e-25, 0.5], [-1e-25, 0, -1e-25], [0.5, -1e-25, 1]], device=device)
    coefficients = ops.pcgrad_coefficients(gram, ORDER).cpu()
    torch.testing.assert_close(coefficients, torch.eye(3).double(), rtol=0, atol=1e-20)
    assert torch.equal(ops.pcgrad_coefficients(torch.zeros_like(gram), ORDER).cpu(), torch.eye(3).double())


def test_coefficients_of_a_gram_matrix_in_fp32_and_of_a_strided_one(seed, path, device):
    """Values, not memory: a strided matrix is read as PyTorch reads it."""
    gram, order = reference.gram(conflicting(5, 50)).float().to(device), ops.random_order(5)
    torch.testing.assert_close(ops.pcgrad_coefficients(gram, order), ops.pcgrad_coefficients(gram.double(), order))
    gram, order = torch.randn(5, 10, device=device).double()[:, ::2], ops.random_order(5)
    expected = ops.pcgrad_coefficients(gram.contiguous(), order)
    assert torch.equal(ops.pcgrad_coefficients(gram, order), expected)
    weights = torch.randn(5, 10, device=device)[:, 3]
    grads = gradients(5, 70, torch.float32, device)
    assert torch.equal(ops.weighted_sum(grads, weights), ops.weighted_sum(grads, weights.contiguous()))


def test_an_order_decides(seed, path, device):
    """Gradients for which the two orders of the first one's opponents give different results."""
    grads = torch.tensor([[1.0, 0, 0], [-1, 1, 0], [-1, -0.5, 1]], device=device)
    first, second = torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[2, 1], [0, 2], [0, 1]])
    updates = [ops.pcgrad_sum(grads, order) for order in (first, second)]
    for update, order in zip(updates, (first, second), strict=True):
        torch.testing.assert_close(update, reference.pcgrad(grads, order).sum(0))
    assert not torch.allclose(*updates)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_orders_of_every_integer_dtype_and_stride(seed, path, device, dtype):
    grads, order = gradients(5, 70, torch.float32, device), ops.random_order(5)
    assert torch.equal(ops.pcgrad_sum(grads, order.to(dtype).T.contiguous().T), ops.pcgrad_sum(grads, order))


# --- layouts ---------------------------------------------------------------------------------------------------------


def like_parameters(dtype, device):
    """A gradient as a list of tensors of many shapes and memory layouts, all of them dense."""
    tensors = [torch.randn(shape) for shape in [(), (0,), (3,), (7, 5), (1,), (1, 1, 9), (2, 0, 4), (513,), (40, 33)]]
    tensors.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    tensors.append(torch.randn(6, 41).T)
    tensors.append(torch.randn(3, 4, 5).permute(1, 2, 0))
    return [tensor.to(device, dtype) for tensor in tensors]


def strided_like(flat, tensors):
    """Consecutive stretches of a vector, with the shapes and memory layouts of the tensors."""
    return [
        part.as_strided(tensor.shape, tensor.stride())
        for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 5, 9])
def test_lists_of_tensors_give_what_one_buffer_gives(seed, path, device, K, dtype):
    parameters = like_parameters(dtype, device)
    buffer = gradients(K, sum(p.numel() for p in parameters), dtype, device)
    lists = [[t.clone() for t in strided_like(row, parameters)] for row in buffer]
    addresses = [t.data_ptr() for row in lists for t in row]
    order = ops.random_order(K)
    expected = Expected(buffer, order)
    weights = torch.randn(K, device=device)
    for update, whole in [
        (ops.pcgrad_sum(lists, order), ops.pcgrad_sum(buffer, order)),
        (ops.weighted_sum(lists, weights), ops.weighted_sum(buffer, weights)),
    ]:
        assert [(t.shape, t.stride()) for t in update] == [(p.shape, p.stride()) for p in parameters]
        assert_close(flattened(update), whole.double(), 4 * expected.scale.sum(), dtype)
    expected.check(tuple(map(tuple, lists)), order)
    assert [t.data_ptr() for row in lists for t in row] == addresses


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_hundreds_of_tiny_tensors(seed, path, device, dtype):
    sizes = torch.randint(0, 9, (700,)).tolist()
    buffer, order = gradients(5, sum(sizes), dtype, device), ops.random_order(5)
    Expected(buffer, order).check([list(row.clone().split(sizes)) for row in buffer], order)


def of_many_kinds(dtype, device):
    """K lists of tensors as models have them, some of them parameters."""
    rows = [like_parameters(dtype, device) for _ in range(3)]
    return [[torch.nn.Parameter(t, requires_grad=False) if i % 2 else t for i, t in enumerate(row)] for row in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_are_read_by_the_extension(seed, path, device, dtype, monkeypatch):
    """All at once, which gives the same bits as one tensor after the other, and writes to the same memory."""
    grads, order = of_many_kinds(dtype, device), ops.random_order(3)
    again = [[t.clone() for t in row] for row in grads]
    known = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and path != "plain" and dtype != torch.float64
    assert isinstance(gradient_lists.checked(grads), gradient_lists.Gathered) == known
    results = step(grads, order)
    monkeypatch.setattr(gradient_lists, "_gathered", lambda grads: None)
    found, expected = (torch.utils._pytree.tree_leaves(x) for x in ((results, grads), (step(again, order), again)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert all(t._version >= 2 for row in grads for t in row), "pcgrad_ and combine_ are told to autograd"


def test_tensors_of_an_update_are_independent(seed, path, device):
    """Also where they share an allocation: neither views of it, nor with a common version counter."""
    update = ops.pcgrad_sum(of_many_kinds(torch.float32, device))
    before, versions = [t.clone() for t in update], [t._version for t in update]
    update[3].add_(torch.ones(7, 5, device=device, requires_grad=True))
    assert [t._version - v for t, v in zip(update, versions, strict=True)] == [i == 3 for i in range(len(update))]
    assert all(torch.equal(a, b) == (i != 3) for i, (a, b) in enumerate(zip(update, before, strict=True)))


@pytest.mark.parametrize("where", ["vmap", "grad", "fake"])
def test_tensors_without_memory_are_not_read(seed, path, device, where):
    x = torch.randn(4, 3, device=device)
    if where == "fake":
        with FakeTensorMode():
            grads = torch.empty(3, 70, dtype=torch.bfloat16)
            gram, update = ops.gram([[torch.empty(3)], [torch.empty(3)]]), ops.pcgrad_sum(grads)
            ops.pcgrad_(grads)
        assert gram.shape == (2, 2) and gram.dtype == torch.float64
        assert update.shape == (70,) and update.dtype == torch.bfloat16
    elif where == "vmap":
        with pytest.raises(RuntimeError):
            torch.vmap(lambda row: ops.gram([[row], [row]]))(x)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            torch.func.grad(lambda x: ops.gram([[x[0]], [x[1]]]).sum())(x)


GUARD = 77.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, gap", [(0, 1), (1, 0), (3, 5), (16, 7)])
def test_rows_anywhere_in_a_wider_buffer(seed, path, device, offset, gap, dtype):
    """Odd row strides and unaligned starts; in place, nothing around the rows changes."""
    K, P = 5, 1003
    storage = torch.full((offset + K * (P + gap) + 9,), GUARD, dtype=dtype, device=device)
    grads = storage.as_strided((K, P), (P + gap, 1), offset)
    grads.copy_(gradients(K, P, dtype, device))
    before, order = storage.clone(), ops.random_order(K)
    ops.gram(grads), ops.pcgrad_sum(grads, order), ops.weighted_sum(grads, torch.ones(K, device=device))
    assert torch.equal(storage, before), "an op that returns its result changed the gradients"

    around = torch.ones_like(storage, dtype=torch.bool)
    around.as_strided((K, P), (P + gap, 1), offset).fill_(False)
    Expected(grads, order).check(grads, order)
    ops.combine_(grads, torch.randn(K, K, device=device))
    assert (storage[around] == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_neighbours_in_memory(seed, path, device, dtype):
    """Lists of tensors carved out of one stretch of memory, with single elements between them."""
    K, sizes = 3, [1, 0, 7, 130, 33, 1, 511]
    storage = torch.full((1 + K * (sum(sizes) + len(sizes)),), GUARD, dtype=dtype, device=device)
    around, lists, start = torch.ones_like(storage, dtype=torch.bool), [[] for _ in range(K)], 1
    for size, row in itertools.product(sizes, lists):
        row.append(storage[start : start + size])
        around[start : start + size] = False
        start += size + 1
    values, order = gradients(K, sum(sizes), dtype, device), ops.random_order(K)
    for row, value in zip(lists, values, strict=True):
        torch._foreach_copy_(row, list(value.split(sizes)))
    Expected(values, order).check(lists, order)
    assert (storage[around] == GUARD).all()


def test_layouts_that_differ_in_dimensions_of_size_one(seed, path, device):
    """The strides of such dimensions are arbitrary."""
    values = torch.randn(2, 6, device=device)
    first = values[0].as_strided((6, 1), (1, 6), 0)
    second = values[1].as_strided((6, 1), (1, 1), 6)
    torch.testing.assert_close(ops.gram([[first], [second]]), reference.gram(values.double()), rtol=0, atol=1e-5)


# --- NaN, infinity and zero ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("K, P", [(1, 3), (5, 1003)])
def test_nan_and_infinity_reach_the_result(seed, path, device, K, P, value, dtype):
    """At every place in a block, and where the coefficients or weights of that gradient are zero."""
    for column in (0, P // 2, P - 1):
        k = int(torch.randint(K, ()))
        grads = gradients(K, P, dtype, device)
        grads[k, column] = value
        gram = ops.gram(grads)
        assert not gram[k].isfinite().any() and not gram[:, k].isfinite().any()
        others = [j for j in range(K) if j != k]
        assert gram[others][:, others].isfinite().all()
        assert not ops.pcgrad_sum(grads)[column].isfinite()
        zero = torch.zeros(K, K, device=device)
        total = ops.weighted_sum(grads, zero[0])
        assert total[column].isnan() and total.isfinite().sum() == P - 1
        combined, projected = grads.clone(), grads.clone()
        ops.combine_(combined, zero)
        assert combined[:, column].isnan().all() and combined.isfinite().sum() == K * (P - 1)
        ops.pcgrad_(projected)
        assert not projected[k, column].isfinite()
        assert not projected.sum(0)[column].isfinite()


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
def test_nan_reaches_the_result_from_every_tensor_of_a_list(seed, path, device, dtype):
    parameters = like_parameters(dtype, device)
    for s, parameter in enumerate(parameters):
        if parameter.numel():
            lists = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
            lists[1][s].fill_(math.nan)
            assert ops.gram(lists)[1].isnan().all()
            update = ops.pcgrad_sum(lists)
            assert update[s].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_coefficients_and_weights_that_are_not_finite(path, device, bad):
    grads = torch.ones(3, 70, device=device)
    assert not ops.weighted_sum(grads, torch.tensor([1, bad, 1], device=device)).isfinite().any()
    coefficients = torch.eye(3, device=device)
    coefficients[1, 2] = bad
    ops.combine_(grads, coefficients)
    assert not grads[1].isfinite().any() and grads[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("K", [1, 2, 9])
def test_an_overflow_of_the_gram_matrix_is_no_silent_error(seed, path, device, K, dtype):
    """Finite gradients whose products are not: the update is right, or NaN."""
    small, order = gradients(K, 1003, dtype, device), ops.random_order(K)
    grads = small * {torch.float64: 1e200}.get(dtype, 1e30)
    assert grads.isfinite().all()
    update, projected = ops.pcgrad_sum(grads, order), grads.clone()
    ops.pcgrad_(projected, order)
    if ops.gram(grads).isfinite().all():  # as in fp64, in which the plain path multiplies
        expected = Expected(grads, order)
        expected.check_sum(update, dtype)
        expected.check_projected(projected, dtype)
    else:
        assert update.isnan().all() and projected.isnan().all()
        assert path != "plain" or dtype == torch.float64
    assert reference.pcgrad(small.float() * 1e30, order).isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("K", [1, 2, 33])
def test_coefficients_of_a_gram_matrix_that_is_not_finite_are_nan(seed, path, device, K, value):
    """On and off the diagonal, in every row."""
    order = ops.random_order(K)
    for i, j in ((0, 0), (K - 1, K - 1), (K // 2, K - 1)):
        gram = reference.gram(conflicting(K, 20))
        gram[i, j] = value
        assert ops.pcgrad_coefficients(gram.to(device), order).isnan().all()
        assert reference.pcgrad_coefficients(gram, order).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0, 2, 4])
def test_an_empty_cluster_changes_nothing(seed, path, device, zero, dtype):
    """Wherever its zero gradient stands in an order: the others are to the bit the same, and right without it."""
    K, others = 5, [k for k in range(5) if k != zero]
    grads = gradients(K, 1003, dtype, device)
    grads[zero] = 0
    order = ops.random_order(K)
    moved = torch.tensor([[zero] * (i != zero) + [j for j in row if j != zero] for i, row in enumerate(order.tolist())])
    projected, again = grads.clone(), grads.clone()
    ops.pcgrad_(projected, order)
    ops.pcgrad_(again, moved)
    assert projected.isfinite().all() and (projected[zero] == 0).all()
    assert torch.equal(projected, again)
    assert torch.equal(ops.pcgrad_sum(grads, order), ops.pcgrad_sum(grads, moved))

    without = torch.tensor([[others.index(j) for j in order[i].tolist() if j != zero] for i in others])
    Expected(grads[others], without).check_projected(projected[others], dtype)


# --- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3, 8, 64])
def test_a_random_order_holds_all_others_once(seed, K):
    order = ops.random_order(K)
    assert order.shape == (K, K - 1) and order.dtype == torch.int64 and order.is_contiguous()
    for i, row in enumerate(order.tolist()):
        assert sorted(row) == [j for j in range(K) if j != i]


def test_random_orders_are_uniform_and_independent():
    """chi^2 over the 6 orders of each row, and over the 36 of two rows together; the bounds are 8 sigma above."""
    generator = torch.Generator().manual_seed(20230601)
    draws = torch.stack([ops.random_order(4, generator) for _ in range(3600)])
    ranks = draws[:, :, :2] @ torch.tensor([5, 1])  # the first two of three name an order
    names = torch.stack([column.unique(return_inverse=True)[1] for column in ranks.unbind(1)], dim=1)
    for row in names.unbind(1):
        counts = row.bincount(minlength=6).double()
        assert ((counts - 600).square() / 600).sum() < 5 + 8 * math.sqrt(2 * 5)
    for a, b in itertools.combinations(names.unbind(1), 2):
        counts = (6 * a + b).bincount(minlength=36).double()
        assert ((counts - 100).square() / 100).sum() < 35 + 8 * math.sqrt(2 * 35)


@pytest.mark.gpu
def test_the_generator_decides_on_an_order_not_the_device(seed):
    on_cpu = ops.random_order(8, torch.Generator().manual_seed(seed))
    on_gpu = ops.random_order(8, torch.Generator().manual_seed(seed), torch.device("cuda"))
    assert on_gpu.device.type == "cuda" and torch.equal(on_gpu.cpu(), on_cpu)
    generator = torch.Generator("cuda").manual_seed(seed)
    assert ops.random_order(8, generator).device.type == "cuda"


def test_a_generator_gives_the_order(seed, path, device):
    """And the default is drawn from PyTorch's own CPU generator."""
    grads = gradients(8, 70, torch.float32, device)
    grads[4:] -= 2 * grads[:4]  # so many conflicts that every order gives another update
    expected = ops.pcgrad_sum(grads, ops.random_order(8, torch.Generator().manual_seed(seed)))
    assert torch.equal(ops.pcgrad_sum(grads, generator=torch.Generator().manual_seed(seed)), expected)
    torch.manual_seed(seed)
    assert torch.equal(ops.pcgrad_sum(grads), expected)
    for update in (ops.pcgrad_sum(grads), ops.pcgrad_sum(grads, generator=torch.Generator().manual_seed(seed + 1))):
        assert not torch.equal(update, expected)
    ops.pcgrad_(grads, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(grads.sum(0), expected)


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", COMPILED_DTYPES, ids=str)
@pytest.mark.parametrize("K, P", [(5, 70_001), (8, 20_000), (33, 9000)])
def test_the_same_bits_every_time(seed, path, device, K, P, dtype):
    """The kernels add in an order that knows nothing of threads: columns of every magnitude, whose sums are rounded."""
    columns = 10 ** (6 * torch.rand(P, dtype=torch.float64) - 3)
    grads, order = (conflicting(K, P) * columns).to(device, dtype), ops.random_order(K)

    def results(count):
        torch.set_num_threads(count)
        projected = grads.clone()
        ops.pcgrad_(projected, order)
        return ops.gram(grads), projected, ops.pcgrad_sum(grads, order)

    first = results(1)
    if path == "plain":  # where it is the processor's BLAS that multiplies
        # Products of gradients that are nearly orthogonal are small sums of large terms.
        torch.testing.assert_close(first[0], first[0].T, rtol=0, atol=1e-13 * first[0].abs().max().item())
    else:
        assert torch.equal(first[0], first[0].T)
    for count in (1,) if path == "plain" else (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(count), strict=True))


# --- properties ------------------------------------------------------------------------------------------------------

drawn_at_random = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def drawn(data, device, clusters=None):
    """Gradients of random number, size, dtype and row stride, some of them zero, and an order."""
    K = clusters or data.draw(st.integers(1, 12), "K")
    P, gap = data.draw(st.integers(1, 1500), "P"), data.draw(st.integers(0, 40), "gap")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    grads = gradients(K, P + gap, dtype, device)[:, gap:]
    empty = data.draw(st.lists(st.integers(0, K - 1), max_size=2), "empty")
    grads[empty] = 0
    torch.manual_seed(data.draw(st.integers(0, 2**20), "order"))
    return grads, ops.random_order(K)


@drawn_at_random
@given(data=st.data())
def test_coefficients_and_loop_agree(seed, path, device, data):
    grads, order = drawn(data, device)
    expected = Expected(grads, order)
    C = ops.pcgrad_coefficients(ops.gram(grads), order)
    assert_close((C @ grads.double()), expected.projected, expected.scale * 2**29, torch.float64)
    expected.check_sum(ops.weighted_sum(grads, C.sum(0)), grads.dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, grads.shape[1]), max_size=5), "cuts"))
    expected.check([list(row.clone().tensor_split(cuts)) for row in grads], order)


@drawn_at_random
@given(data=st.data())
def test_the_update_of_two_clusters_harms_neither(seed, path, device, data):
    grads, order = drawn(data, device, clusters=2)
    update = ops.pcgrad_sum(grads, order).double()
    norms, unit = grads.double().norm(dim=1), torch.finfo(grads.dtype).eps
    assert (grads.double() @ update >= -4 * unit * norms * norms.sum()).all()


@drawn_at_random
@given(data=st.data(), exponent=st.integers(-12, 6))
def test_a_common_factor_passes_through(seed, path, device, data, exponent):
    """To the bit for powers of two: conflicts depend on angles alone."""
    grads, order = drawn(data, device)
    if grads.dtype == torch.float16:  # which would round them
        grads = grads.float()
    scaled = grads * 2.0**exponent
    assert torch.equal(ops.pcgrad_sum(scaled, order), ops.pcgrad_sum(grads, order) * 2.0**exponent)


# --- bad input -------------------------------------------------------------------------------------------------------

GRADS = torch.arange(12.0).reshape(3, 4) - 5
ORDER = torch.tensor([[1, 2], [0, 2], [0, 1]])
TAKES_GRADIENTS = {
    "gram": ops.gram,
    "pcgrad_": ops.pcgrad_,
    "pcgrad_sum": ops.pcgrad_sum,
    "combine_": lambda grads: ops.combine_(grads, torch.eye(3)),
    "weighted_sum": lambda grads: ops.weighted_sum(grads, torch.ones(3)),
}


def tensors_in(grads):
    """All tensors somewhere in an argument."""
    if isinstance(grads, torch.Tensor):
        return [grads]
    return [t for item in grads for t in tensors_in(item)] if isinstance(grads, (list, tuple)) else []


def untouched(call, grads, error, fragments):
    """``call`` refuses its arguments before it writes to the gradients."""
    kept = [t for t in tensors_in(grads) if t.device.type != "meta" and not t.is_sparse]
    before = [t.detach().clone() for t in kept]
    refused(call, error, fragments)
    assert all(torch.equal(a.detach(), b) for a, b in zip(kept, before, strict=True))


def three(*tensors):
    """Lists of the gradients of three clusters, equal up to the last cluster's, which are ``tensors``."""
    return [[torch.ones(2, 3)], [torch.ones(2, 3)], list(tensors)]


BAD_GRADIENTS = {
    "a vector": (lambda: torch.ones(4), ValueError, ["[K, P]", "shape [4]"]),
    "three dimensions": (lambda: torch.ones(3, 2, 2), ValueError, ["[K, P]", "shape [3, 2, 2]"]),
    "nothing": (lambda: None, TypeError, ["[K, P]", "list", "NoneType"]),
    "an iterator": (lambda: iter([[torch.ones(4)]]), TypeError, ["[K, P]", "list", "iterator"]),
    "a list of tensors": (lambda: [torch.ones(4)] * 3, TypeError, ["lists of tensors", "list that holds a Tensor"]),
    "no clusters": (lambda: [], ValueError, ["1 to 64", "got 0"]),
    "no rows": (lambda: torch.ones(0, 4), ValueError, ["1 to 64", "got 0"]),
    "65 clusters": (lambda: torch.ones(65, 4), ValueError, ["1 to 64", "got 65"]),
    "65 lists": (lambda: [[torch.ones(4)] for _ in range(65)], ValueError, ["1 to 64", "got 65"]),
    "no parameters": (lambda: [[], [], []], ValueError, ["no tensors", "at least one parameter"]),
    "ragged": (lambda: three(torch.ones(2, 3), torch.ones(1)), ValueError, ["grads[2]", "2 tensors", "grads[0] has 1"]),
    "None in a list": (lambda: three(None), TypeError, ["grads[2][0]", "must be a tensor", "NoneType"]),
    "None at the start": (lambda: [[None], [None], [None]], TypeError, ["grads[0][0]", "must be a tensor", "NoneType"]),
    "text": (lambda: ["a", "b", "c"], TypeError, ["grads[0][0]", "must be a tensor", "str"]),
    "another shape": (lambda: three(torch.ones(3, 2)), ValueError, ["grads[2][0]", "[3, 2]", "[2, 3]"]),
    "another dtype": (lambda: three(torch.ones(2, 3).double()), ValueError, ["grads[2][0]", "float64", "float32"]),
    "another device": (lambda: three(torch.ones(2, 3, device="meta")), ValueError, ["grads[2][0]", "meta", "cpu"]),
    "another layout": (lambda: three(torch.ones(3, 2).T), ValueError, ["grads[2][0]", "strides (1, 2)", "contiguous"]),
    "another dtype of a parameter": (
        lambda: [[torch.ones(2), torch.ones(2).half()]] * 3, ValueError, ["grads[0][1]", "float16", "float32", "one"],
    ),
    "every other element": (lambda: torch.ones(3, 8)[:, ::2], ValueError, ["grads[0]", "strides (2,)", "contiguous"]),
    "columns": (lambda: torch.ones(4, 3).T, ValueError, ["grads[0]", "strides (3,)", "contiguous"]),
    "expanded rows": (lambda: torch.ones(3, 1).expand(3, 4), ValueError, ["grads[0]", "strides (0,)", "contiguous"]),
    "expanded tensors": (
        lambda: [[torch.ones(3).expand(2, 3)]] * 3, ValueError, ["grads[0][0]", "strides (0, 1)", "contiguous"],
    ),
    "windows of a tensor": (
        lambda: [[torch.ones(9).unfold(0, 3, 1)]] * 3, ValueError, ["grads[0][0]", "strides (1, 1)", "contiguous"],
    ),
    "integers": (lambda: torch.ones(3, 4).int(), TypeError, ["grads[0]", "fp32, bf16, fp16 or fp64", "int32"]),
    "complex numbers": (lambda: torch.ones(3, 4) * 1j, TypeError, ["grads[0]", "fp32, bf16, fp16 or", "complex64"]),
    "fp8": (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), TypeError, ["fp32, bf16, fp16 or fp64", "float8_e4m3fn"]),
    "sparse": (lambda: three(torch.ones(2, 3).to_sparse()), TypeError, ["grads[2][0]", "sparse_coo", "to_dense"]),
    "requires grad": (lambda: torch.ones(3, 4).requires_grad_(), ValueError, ["grads[0]", "requires grad", "detach"]),
    "one requires grad": (
        lambda: three(torch.ones(2, 3).requires_grad_()), ValueError, ["grads[2][0]", "requires grad", "detach"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES_GRADIENTS)
@pytest.mark.parametrize("make, error, fragments", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_bad_gradients(name, make, error, fragments):
    grads = make()
    untouched(lambda: TAKES_GRADIENTS[name](grads), grads, error, ["grads", *fragments])


def overlapping(distance):
    return torch.arange(20.0).as_strided((3, 4), (distance, 1))


SHARED_MEMORY = {
    "one row expanded": lambda: torch.ones(1, 4).expand(3, 4),
    "rows that overlap by one element": lambda: overlapping(3),
    "a tensor twice": lambda: [[same := torch.ones(4)], [torch.ones(4)], [same]],
    "a parameter twice": lambda: [[same := torch.ones(4), torch.ones(2), same] for _ in range(3)],
    "views of one tensor": lambda: [[v] for v in torch.arange(9.0).unfold(0, 4, 2)],
    "another view of memory": lambda: [[(g := torch.ones(4))], [torch.from_numpy(g.numpy())], [torch.ones(4)]],
}


@pytest.mark.parametrize("make", SHARED_MEMORY.values(), ids=SHARED_MEMORY)
def test_gradients_that_share_memory_are_not_changed_in_place(path, make):
    """But they can be read."""
    grads = make()
    for call in (lambda: ops.pcgrad_(grads), lambda: ops.combine_(grads, torch.eye(3))):
        untouched(call, grads, ValueError, ["share memory", "grads[", "clone"])
    ops.gram(grads)
    ops.pcgrad_sum(grads)


def test_neighbours_in_memory_share_nothing(path):
    ops.pcgrad_(overlapping(4))
    ops.pcgrad_([[part] for part in torch.ones(9).split(3)])
    ops.pcgrad_([[torch.ones(0), torch.ones(3)[3:], torch.ones(1)] for _ in range(3)])
    ops.pcgrad_([[part[1:1], part] for part in torch.ones(9).split(3)])


BAD_ORDERS = {
    "a list": ([[1, 2], [0, 2], [0, 1]], TypeError, ["integer tensor", "list"]),
    "floats": (ORDER.float(), TypeError, ["integer tensor", "float32"]),
    "booleans": (ORDER.bool(), TypeError, ["integer tensor", "bool"]),
    "complex numbers": (ORDER * 1j, TypeError, ["integer tensor", "complex64"]),
    "K x K": (torch.zeros(3, 3).long(), ValueError, ["[3, 2]", "got [3, 3]"]),
    "transposed": (ORDER.T, ValueError, ["[3, 2]", "got [2, 3]"]),
    "one for all": (torch.tensor([0, 1]), ValueError, ["[3, 2]", "got [2]"]),
    "of four clusters": (ops.random_order(4), ValueError, ["[3, 2]", "3 gradients", "got [4, 3]"]),
    "itself": (torch.tensor([[1, 2], [0, 1], [0, 1]]), ValueError, ["order[1]", "permutation", "[0, 1]"]),
    "one twice": (torch.tensor([[1, 2], [0, 2], [1, 1]]), ValueError, ["order[2]", "permutation", "[1, 1]"]),
    "negative": (torch.tensor([[1, -1], [0, 2], [0, 1]]), ValueError, ["order[0]", "permutation", "[1, -1]"]),
    "too large": (torch.tensor([[1, 3], [0, 2], [0, 1]]), ValueError, ["order[0]", "permutation", "[1, 3]"]),
    "on another device": (ORDER.to("meta"), ValueError, ["meta", "cpu", "move it"]),
}


@pytest.mark.parametrize("order, error, fragments", BAD_ORDERS.values(), ids=BAD_ORDERS)
def test_bad_orders(order, error, fragments):
    grads = GRADS.clone()
    for call in (
        lambda: ops.pcgrad_(grads, order),
        lambda: ops.pcgrad_sum(grads, order=order),
        lambda: ops.pcgrad_coefficients(grads @ grads.T, order),
    ):
        untouched(call, grads, error, ["order", *fragments])


def test_bad_orders_that_the_host_cannot_see(seed, path, device):
    """On a GPU, values are seen by the kernel alone: a row that is no permutation must not read anything else."""
    order = ops.random_order(5, device=device)
    order[1, 0], order[2, 1], order[3, 0], order[4, 2] = 99, 2, order[3, 1], -1
    grads = gradients(5, 70, torch.float64, device)
    out = OPS.pcgrad_coefficients(grads @ grads.T, order)
    assert out[0].isfinite().all() and out[1:].isnan().all()
    assert device.type == "cpu" or ops.pcgrad_sum(grads.float(), order).isnan().all()


BAD_GRAMS = {
    "nothing": (None, TypeError, ["floating-point tensor", "NoneType"]),
    "integers": (torch.eye(3).long(), TypeError, ["floating-point tensor", "int64"]),
    "not square": (torch.ones(3, 2), ValueError, ["[K, K]", "got [3, 2]"]),
    "a vector": (torch.ones(3), ValueError, ["[K, K]", "got [3]"]),
    "empty": (torch.ones(0, 0), ValueError, ["[K, K]", "1 to 64", "got [0, 0]"]),
    "too large": (torch.ones(65, 65), ValueError, ["[K, K]", "1 to 64", "got [65, 65]"]),
}


@pytest.mark.parametrize("gram, error, fragments", BAD_GRAMS.values(), ids=BAD_GRAMS)
def test_bad_gram_matrices(gram, error, fragments):
    refused(lambda: ops.pcgrad_coefficients(gram, ORDER), error, ["gram", *fragments])


BAD_FACTORS = {
    "a list": (lambda shape: torch.ones(shape).tolist(), TypeError, ["floating-point tensor", "list"]),
    "integers": (lambda shape: torch.ones(shape).long(), TypeError, ["floating-point tensor", "int64"]),
    "complex numbers": (lambda shape: torch.ones(shape) * 1j, TypeError, ["floating-point tensor", "complex64"]),
    "too many": (lambda shape: torch.ones([n + 1 for n in shape]), ValueError, ["3 gradients", "4"]),
    "another dimension": (lambda shape: torch.ones(*shape, 1), ValueError, ["3 gradients", "1]"]),
    "a scalar": (lambda shape: torch.ones(()), ValueError, ["3 gradients", "[]"]),
    "on another device": (lambda shape: torch.ones(shape, device="meta"), ValueError, ["meta", "cpu", "move"]),
}


@pytest.mark.parametrize("make, error, fragments", BAD_FACTORS.values(), ids=BAD_FACTORS)
def test_bad_coefficients_and_weights(make, error, fragments):
    grads = GRADS.clone()
    coefficients, weights = make([3, 3]), make([3])
    untouched(lambda: ops.combine_(grads, coefficients), grads, error, ["coefficients", *fragments])
    untouched(lambda: ops.weighted_sum(grads, weights), grads, error, ["weights", *fragments])


# --- as PyTorch's own ops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_ops(seed, path, device, dtype):
    shapes = [torch.empty(()), torch.empty(0, 2), torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    grads = [torch.randn_like(t, dtype=dtype, device=device) for t in shapes for _ in range(3)]
    order = ORDER.to(device)
    opcheck(OPS.gram, (grads, 3))
    opcheck(OPS.combine_, (grads, torch.randn(3, 3, device=device).double()))
    opcheck(OPS.weighted_sum, (grads, torch.randn(3, device=device).double()))
    opcheck(OPS.pcgrad_coefficients, (OPS.gram(grads, 3), order))


def step(grads, order):
    """All of the ops, as a training step might use them."""
    update = ops.pcgrad_sum(grads, order)
    gram = ops.gram(grads)
    ops.pcgrad_(grads, order)
    ops.combine_(grads, gram)
    return gram, update, ops.weighted_sum(grads, gram[0])


@pytest.mark.parametrize("kind, dynamic", [("buffer", True), ("lists", False)])
def test_compiled(seed, path, device, fresh_compiler, kind, dynamic):
    """Without graph breaks, and in place on the caller's tensors."""
    grads = gradients(3, 70, torch.float32, device)
    if kind == "lists":
        grads = [list(row.clone().split([7, 0, 63])) for row in grads]
    again = torch.utils._pytree.tree_map(torch.clone, grads)
    order = ops.random_order(3, device=device)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected, results = step(grads, order), compiled(again, order)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, grads, rtol=0, atol=0)


def test_compiled_with_a_random_order(seed, path, device, fresh_compiler):
    grads = gradients(3, 70, torch.float32, device)
    possible = [
        ops.pcgrad_sum(grads, torch.tensor(rows)) for rows in itertools.product(*(([a, b], [b, a]) for a, b in ORDER))
    ]
    update = torch.compile(lambda grads: ops.pcgrad_sum(grads), backend="aot_eager", fullgraph=True)(grads)
    assert any(torch.equal(update, expected) for expected in possible)


def test_compiled_ops_refuse_what_eager_ones_refuse(fresh_compiler):
    compiled = torch.compile(lambda grads, order: ops.pcgrad_(grads, order), backend="aot_eager")
    refused(lambda: compiled(torch.ones(3, 4).T, ORDER.T), ValueError, ["strides"])


@pytest.mark.parametrize("order_on", ["cpu", "cuda"])
def test_compiles_for_a_gpu_that_is_not_there(fresh_compiler, order_on):
    with FakeTensorMode():
        grads = torch.empty(3, 70, device="cuda")
        order = torch.empty(3, 2, dtype=torch.int64, device=order_on)
        update = torch.compile(ops.pcgrad_sum, backend="eager", fullgraph=True)(grads, order)
    assert update.device.type == "cuda" and update.shape == (70,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(seed, path, device, mode):
    grads, order = gradients(3, 70, torch.float32, device), ops.random_order(3, device=device)
    again = grads.clone()
    expected = step(grads, order)
    with mode():
        fresh = again.clone()
        results, on_inside = step(again, order), step(fresh, order)
    for got in (results, on_inside):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(again, grads) and torch.equal(fresh, grads)
    assert not any(t.requires_grad for t in results)


def test_gradients_that_require_grad_under_no_grad(seed, path, device):
    grads = gradients(3, 70, torch.float32, device).requires_grad_()
    with torch.no_grad():
        expected = reference.pcgrad(grads.double(), ORDER)
        ops.pcgrad_(grads, ORDER)
    torch.testing.assert_close(grads.detach().double(), expected, rtol=0, atol=1e-5)


def test_autograd_notices_a_change_in_place(seed, path, device):
    """It must not take the projected gradients for those that it saved."""
    grads, weight = gradients(3, 70, torch.float32, device), torch.ones(3, 70, device=device, requires_grad=True)
    loss = (weight * grads).sum()
    version = grads._version
    ops.gram(grads), ops.pcgrad_sum(grads)
    assert grads._version == version
    ops.pcgrad_(grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(seed, path, device, dtype):
    grads, order = gradients(3, 1003, torch.float32, device), ops.random_order(3, device=device)
    again = grads.clone()
    expected = step(grads, order)
    with torch.autocast(device.type, dtype=dtype):
        results = step(again, order)
    assert all(torch.equal(a, b) for a, b in zip((*results, again), (*expected, grads), strict=True))


@pytest.mark.gpu
def test_the_host_never_waits(seed):
    grads, order = gradients(5, 1003, torch.float32, "cuda"), ops.random_order(5, device=torch.device("cuda"))
    step(grads, order)
    with waiting_is_an_error():
        step(grads, order)
        ops.pcgrad_(grads)  # nor for an order that it draws itself
        ops.pcgrad_(grads, ops.random_order(5))


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_step(seed):
    grads, order = gradients(5, 1003, torch.float32, "cuda"), ops.random_order(5, device=torch.device("cuda"))
    before = grads.clone()
    step(grads, order)  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(grads, order)
    for _ in range(2):
        fresh = gradients(5, 1003, torch.float32, "cuda")
        grads.copy_(fresh)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(fresh, order), strict=True))
        assert torch.equal(grads, fresh) and not torch.equal(grads, before)


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [{"order": ORDER}, {"generator": torch.Generator()}], ids=["order", "generator"])
def test_a_cuda_graph_takes_no_order_from_the_cpu(arguments):
    """Replays would read memory that was freed after the capture."""
    grads = torch.ones(3, 70, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads.mul_(1)  # a graph must not be empty
        refused(lambda: ops.pcgrad_sum(grads, **arguments), ValueError, ["order", "generator", "CUDA graph"])


@pytest.mark.gpu
def test_a_cuda_graph_draws_an_order_at_every_replay(seed):
    grads = gradients(8, 1003, torch.float32, "cuda")
    ops.pcgrad_sum(grads)  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update = ops.pcgrad_sum(grads)
    updates = []
    for _ in range(3):
        graph.replay()
        updates.append(update.clone())
        assert update.isfinite().all()
    assert not torch.equal(updates[0], updates[1]) or not torch.equal(updates[1], updates[2])
