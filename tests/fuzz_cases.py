"""Random calls of every function of the compiled extension: right ones, with what they should compute, and wrong ones.

The extension takes bare addresses, so a mistake in it or in what it refuses is memory that is read or overwritten. Here
every argument has memory of exactly its size, for a sanitizer to guard. NumPy alone, since PyTorch does not run under
AddressSanitizer as it is.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

TYPES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}
_STORED = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.float16, "i32": np.int32, "i64": np.int64}
# The largest error, relative to the largest number of its kind: mistakes show, roundings do not.
_TOLERANCE = {"f64": 1e-9, "f32": 1e-4, "f16": 3e-2, "bf16": 0.2}

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


def encoded(values: np.ndarray, type: str) -> np.ndarray:
    """Numbers as memory holds them: bf16 as the upper halves of fp32, rounded to nearest even."""
    if type != "bf16":
        return values.astype(_STORED[type])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decoded(stored: np.ndarray, type: str) -> np.ndarray:
    """The same, as fp64."""
    if type == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


class Operand:
    """An argument with memory of its own: rows of numbers, ``stride`` apart, with NaN (or -1) between them.

    Args:
        values: [rows, columns], what it holds; or the shape of a result, which begins as NaN.
        kind: "tokens" of any type, "vectors" of the compute type, or "whole", which must be contiguous.
    """

    def __init__(
        self, values: np.ndarray | tuple[int, int], type: str, kind: str, stride: int | None = None, shift: int = 0
    ) -> None:
        self.written = isinstance(values, tuple)
        self.type, self.kind = type, kind
        self.rows, self.columns = values if isinstance(values, tuple) else values.shape
        self.stride = self.columns if stride is None else stride
        self.itemsize = np.dtype(_STORED[type]).itemsize
        elements = (self.rows - 1) * self.stride + self.columns if self.rows else 0
        self.bytes = elements * self.itemsize
        self._block = _libc.malloc(self.bytes + shift * self.itemsize)
        self.address = self._block + shift * self.itemsize
        self._memory = np.frombuffer((ctypes.c_char * self.bytes).from_address(self.address), _STORED[type])
        self._memory.view(np.uint8)[:] = 0xFF
        if not isinstance(values, tuple):
            self._rows()[:] = encoded(values, type)
        self._before = self._memory.copy()

    def __del__(self) -> None:
        _libc.free(self._block)

    def _rows(self) -> np.ndarray:
        strides = (self.stride * self.itemsize, self.itemsize)
        return np.lib.stride_tricks.as_strided(self._memory, (self.rows, self.columns), strides)

    def scramble(self, rng: np.random.Generator) -> None:
        """Fills it with random bits."""
        self._memory.view(np.uint8)[:] = rng.integers(0, 256, self.bytes, np.uint8)
        self._before = self._memory.copy()

    def read(self) -> np.ndarray:
        """fp64 [rows, columns]"""
        return decoded(self._rows().copy(), self.type)

    def is_as_before(self) -> bool:
        """Return whether nothing was written."""
        return np.array_equal(self._memory.view(np.uint8), self._before.view(np.uint8))

    def assert_nothing_else_written(self) -> None:
        """Assert that the memory between the rows of a result, and all of an input, is unchanged."""
        now, before = (x.view(np.uint8).reshape(-1, self.itemsize) for x in (self._memory, self._before))
        inside = np.zeros(len(self._memory), bool)
        if self.written:
            np.lib.stride_tricks.as_strided(inside, (self.rows, self.columns), (self.stride, 1))[:] = True
        assert ((now == before).all(1) | inside).all()


# The extension's arguments as plain numbers, so that they can be made wrong.


class Rows(NamedTuple):
    data: int
    type: int
    stride: int


class Shape(NamedTuple):
    B: int
    N: int
    C: int
    start: int
    width: int
    chunk: int


class Gradients(NamedTuple):
    type: int
    clusters: int
    pointers: list[int]
    sizes: list[int]


class Enum(NamedTuple):
    value: int


def issue(kernels: Any, function: str, arguments: list[Any]) -> Any:
    """Calls a function of the extension; "cuda.gram" is one of its submodule."""
    return operator.attrgetter(function)(kernels)(*converted(kernels, arguments))


def converted(kernels: Any, arguments: list[Any]) -> list[Any]:
    """Arguments as the extension takes them."""

    def one(argument: Any) -> Any:
        match argument:
            case Rows():
                return argument.data, kernels.Type(argument.type), argument.stride
            case Gradients():
                return kernels.Gradients.at(kernels.Type(argument.type), *argument[1:])
            case Shape():
                return tuple(argument)
            case Enum():
                return kernels.Type(argument.value)
        return argument

    return [one(argument) for argument in arguments]


@dataclass
class Call:
    """A right call.

    Attributes:
        arguments: by name, in order: an Operand (or None), a list of them, or what ``issue`` takes.
        expected: computes the results, by the names of the arguments that hold them; None for random bits.
        optional: arguments that may be absent. in_place: pairs of arguments that may be the same memory.
        addresses: whether operands are passed as bare addresses instead of Rows.
        keeps: operands that arguments point to. through: a type that numbers are rounded to on the way.
    """

    function: str
    arguments: dict[str, Any]
    expected: Callable[[], dict[str, np.ndarray]] | None = None
    optional: frozenset[str] = frozenset()
    in_place: tuple[tuple[str, str], ...] = ()
    addresses: bool = False
    keeps: list[Operand] = field(default_factory=list)
    through: str | None = None

    def operands(self) -> dict[str, Operand]:
        return {name: x for name, x in self.arguments.items() if isinstance(x, Operand)}

    def plain(self) -> dict[str, Any]:
        """The arguments as ``issue`` takes them."""

        def converted(x: Any) -> Any:
            if isinstance(x, Operand):
                return x.address if self.addresses else Rows(x.address, TYPES[x.type], x.stride)
            if isinstance(x, list):
                return [operand.address for operand in x]
            return Rows(0, 0, 0) if x is None else x

        return {name: converted(x) for name, x in self.arguments.items()}

    def scramble(self, draw: Draw) -> None:
        """Random bits instead of numbers: NaN, infinities, denormal numbers. Only the windows stay."""
        self.expected = None
        for operand in [*self.operands().values(), *self.keeps]:
            if operand.type != "i32":
                operand.scramble(draw.numbers)

    def run(self, kernels: Any, issue: Callable[..., Any] = issue) -> None:
        """Calls the extension, as ``issue`` does, and checks everything it wrote."""
        expected = self.expected() if self.expected else {}
        issue(kernels, self.function, list(self.plain().values()))
        everything = [*self.operands().values(), *self.keeps]
        if not self.in_place:
            for operand in everything:
                operand.assert_nothing_else_written()
        worst = max(_TOLERANCE.get(type, 0) for type in [self.through, *(x.type for x in everything)])
        for name, right in expected.items():
            argument = self.arguments[name]
            results = argument if isinstance(argument, list) else self.keeps if name == "gradients" else [argument]
            ours = np.concatenate([x.read().ravel() for x in results])
            assert (np.isnan(ours) == np.isnan(right.ravel())).all(), f"{self.function}: {name} has NaN elsewhere"
            difference, size = np.nan_to_num(np.abs(ours - right.ravel())), np.nan_to_num(np.abs(right))
            assert (difference <= worst * (1 + size.max(initial=0))).all(), f"{self.function}: {name} is wrong"


class Draw:
    """Random numbers, sizes and arguments; the same for the same seed."""

    def __init__(self, seed: str) -> None:
        self.choice = random.Random(seed)
        self.numbers = np.random.default_rng(self.choice.getrandbits(64))
        self.slow = False  # whether many gradients take long, as on the simulated GPU

    def clusters(self) -> int:
        if self.slow and self.choice.random() < 0.95:
            return self.size(13)
        return self.choice.choice([1, 2, 3, 5, 8, 9, 17, 64, self.size(64)])

    def size(self, most: int) -> int:
        """Often small, often next to a power of two."""
        near = 2 ** self.choice.randint(0, most.bit_length() - 1) + self.choice.randint(-1, 1)
        return min(most, max(1, self.choice.choice([near, self.choice.randint(1, most)])))

    def flag(self) -> bool:
        return self.choice.random() < 0.5

    def type(self) -> str:
        return self.choice.choice(["f32", "bf16", "f16"])

    def values(self, rows: int, columns: int) -> np.ndarray:
        return self.numbers.standard_normal((rows, columns))

    def input(self, rows: int, columns: int, type: str, kind: str = "tokens") -> Operand:
        stride = columns
        if kind != "whole":
            stride += self.choice.choice([0, 0, 1, 5, columns])
        values = self.values(rows, columns)
        if kind != "whole" and self.choice.random() < 0.1:  # expanded
            stride, values = 0, np.broadcast_to(values[:1], values.shape)
        return Operand(values, type, kind, stride, self.choice.choice([0, 0, 1, 3]))

    def result(self, rows: int, columns: int, type: str, kind: str = "tokens") -> Operand:
        stride = columns + (self.choice.choice([0, 0, 1, 5]) if kind == "tokens" else 0)
        return Operand((rows, columns), type, kind, stride, self.choice.choice([0, 0, 1, 3]))


class Batch:
    """A shape with its windows, and arguments that fit it."""

    def __init__(self, draw: Draw, routed: bool | None = None) -> None:
        self.draw = draw
        self.B, self.N, self.C = draw.size(4), draw.size(70), draw.size(200)
        if draw.choice.random() < 0.05:
            self.N = 0
        self.routed = draw.flag() if routed is None else routed
        self.width = draw.choice.randint(1, self.C) if self.routed else self.C
        self.chunk = draw.size(40)
        self.chunks = -(-self.N // self.chunk)
        self.starts = draw.numbers.integers(0, self.C - self.width + 1, (1, self.B))
        self.start = Operand(self.starts, "i32", "whole") if self.routed else None
        self.double = draw.choice.random() < 0.2
        self.compute = "f64" if self.double else "f32"
        channel, first = np.arange(self.C), self.starts[0][:, None]
        self.mask = ((channel >= first) & (channel < first + self.width))[:, None, :]

    def shape(self) -> Shape:
        start = self.start.address if self.start else 0
        return Shape(self.B, self.N, self.C, start, self.width, self.chunk)

    def leading(self) -> str:
        return "f64" if self.double else self.draw.type()

    def tokens(self, columns: int, type: str | None = None, result: bool = False) -> Operand:
        make = self.draw.result if result else self.draw.input
        return make(self.B * self.N, columns, type or self.leading())

    def vectors(self) -> Operand:
        return self.draw.input(self.B, self.C, self.compute, "vectors")

    def statistics(self, result: bool = False) -> Operand:
        make = self.draw.result if result else self.draw.input
        return make(self.B, self.N, self.compute, "whole")

    def sums(self, planes: int) -> Operand:
        return self.draw.result(planes * self.B * self.chunks, self.C, self.compute, "whole")

    def read(self, x: Operand | None) -> np.ndarray | float:
        """An argument as [B, N or 1, columns or 1]; 0 if absent."""
        if x is None:
            return 0.0
        if x.kind == "vectors":
            return x.read()[:, None, :]
        return x.read()[:, :, None] if x.kind == "whole" else x.read().reshape(self.B, self.N, x.columns)

    def compact(self, x: np.ndarray) -> np.ndarray:
        """The window of [B, N, C]."""
        return np.stack([row[:, s : s + self.width] for row, s in zip(x, self.starts[0], strict=True)])

    def dense(self, x: np.ndarray) -> np.ndarray:
        """Its inverse, with zeros elsewhere."""
        out = np.zeros((self.B, self.N, self.C))
        for row, window, s in zip(out, x, self.starts[0], strict=True):
            row[:, s : s + self.width] = window
        return out

    def summed(self, *planes: np.ndarray) -> np.ndarray:
        """Sums over each chunk of tokens."""
        cuts = np.arange(0, self.N, self.chunk)
        return np.stack([np.add.reduceat(plane, cuts, 1) if self.N else plane[:, :0] for plane in planes])


def norm_forward(draw: Draw) -> Call:
    batch = Batch(draw)
    update = draw.flag()
    keep = update and draw.choice.random() < 0.3
    stream_type, x = batch.leading(), batch.tokens(batch.C)
    branch, gate = (batch.tokens(batch.C), batch.vectors()) if update else (None, None)
    stream = batch.tokens(batch.C, stream_type, result=True) if update and draw.flag() else None
    compact = batch.routed and not keep and draw.flag()
    u = batch.tokens(batch.width if compact else batch.C, result=True)
    shift, scale, rms = batch.vectors(), batch.vectors(), draw.flag()
    mean, rstd = None if rms else batch.statistics(result=True), batch.statistics(result=True)
    eps = draw.choice.uniform(0.05, 1)  # the variance of a channel alone is zero

    def expected() -> dict[str, np.ndarray]:
        x_, added = batch.read(x), batch.read(gate) * batch.read(branch)
        rounded = decoded(encoded(x_ + added, stream_type), stream_type)
        v = x_ * batch.mask + added if keep else (rounded if update else x_) * batch.mask
        mu = 0 if rms else v.mean(-1, keepdims=True)
        r = 1 / np.sqrt(((v - mu) ** 2).mean(-1, keepdims=True) + eps)
        z = (v - mu) * r * (1 + batch.read(scale)) + batch.read(shift)
        out = {"u": batch.compact(z) if compact else z, "rstd": r} | ({} if rms else {"mean": mu})
        return out | {"stream": x_ + added} if stream else out

    stored = Enum(TYPES[stream_type])
    arguments = dict(shape=batch.shape(), eps=eps, compact=compact, keep_branch=keep, rms=rms)
    arguments |= dict(
        stream_type=stored,
        x=x,
        branch=branch,
        stream=stream,
        u=u,
        gate=gate,
        shift=shift,
        scale=scale,
        mean=mean,
        rstd=rstd,
    )
    optional, through = frozenset({"branch", "stream"}), stream_type if update and not keep else None
    return Call("norm_forward", arguments, expected, optional, keeps=_kept(batch.start), through=through)


def norm_backward(draw: Draw) -> Call:
    batch = Batch(draw)
    update = draw.flag()
    keep = update and draw.choice.random() < 0.3
    x_is_stream = draw.flag() and not keep
    compact = batch.routed and not keep and draw.flag()
    du = batch.tokens(batch.width if compact else batch.C)
    dstream = batch.tokens(batch.C) if draw.flag() else None
    x = batch.tokens(batch.C)
    branch, gate = (batch.tokens(batch.C), batch.vectors()) if update else (None, None)
    dx, dbranch = batch.tokens(batch.C, result=True), batch.tokens(batch.C, result=True) if update else None
    scale, rms, rstd = batch.vectors(), draw.flag(), batch.statistics()
    mean = None if rms else batch.statistics()
    inactive = batch.statistics() if compact and not rms else None
    sums = batch.sums(3 if update else 2)

    def expected() -> dict[str, np.ndarray]:
        v, b, g = batch.read(x), batch.read(branch), batch.read(gate)
        if update and not keep and not x_is_stream:
            v = decoded(encoded(v + g * b, x.type), x.type)
        v = v * batch.mask + (g * b if keep else 0)
        mu, r, extra = batch.read(mean), batch.read(rstd), batch.read(inactive)
        z = (v - mu) * r
        d = batch.dense(batch.read(du)) if compact else batch.read(du)
        dz = d * (1 + batch.read(scale))
        total = 0 if rms else dz.sum(-1, keepdims=True) + extra
        along = (dz * z).sum(-1, keepdims=True) - mu * r * extra
        dv = r * (dz - (total + z * along) / batch.C) * (batch.mask | keep)
        onto = np.broadcast_to(batch.read(dstream), dv.shape)
        out = {"dx": onto + dv * batch.mask}
        if update:
            out["dbranch"] = (onto + dv) * g
        planes = [d, d * z] + ([(onto + dv) * b] if update else [])
        return out | {"sums": batch.summed(*planes)}

    arguments = dict(shape=batch.shape(), compact=compact, keep_branch=keep, rms=rms, x_is_stream=x_is_stream)
    arguments |= dict(du=du, dstream=dstream, x=x, branch=branch, dx=dx, dbranch=dbranch, gate=gate, scale=scale)
    arguments |= dict(mean=mean, rstd=rstd, inactive=inactive, sums=sums)
    return Call("norm_backward", arguments, expected, frozenset({"dstream"}), keeps=_kept(batch.start))


def residual_forward(draw: Draw) -> Call:
    batch = Batch(draw, routed=False)
    x, branch, gate = batch.tokens(batch.C), batch.tokens(batch.C), batch.vectors()
    out = batch.tokens(batch.C, result=True)

    def expected() -> dict[str, np.ndarray]:
        return {"out": batch.read(x) + batch.read(gate) * batch.read(branch)}

    return Call(
        "residual_forward", {"shape": batch.shape(), "x": x, "branch": branch, "out": out, "gate": gate}, expected
    )


def residual_backward(draw: Draw) -> Call:
    batch = Batch(draw, routed=False)
    dout, branch, gate = batch.tokens(batch.C), batch.tokens(batch.C), batch.vectors()
    dbranch, sums = batch.tokens(batch.C, result=True), batch.sums(1)

    def expected() -> dict[str, np.ndarray]:
        d = batch.read(dout)
        return {"dbranch": d * batch.read(gate), "sums": batch.summed(d * batch.read(branch))}

    arguments = {"shape": batch.shape(), "dout": dout, "branch": branch, "dbranch": dbranch, "gate": gate, "sums": sums}
    return Call("residual_backward", arguments, expected)


def activation(draw: Draw) -> Call:
    kind = draw.choice.choice(["gelu_tanh", "gelu", "silu", "swiglu"])
    gated = kind == "swiglu"
    width = draw.choice.choice([0, draw.size(5000), draw.size(50)])
    rows = draw.size(4) if width else 0
    leading = draw.choice.choice(["f32", "f64", "bf16", "f16"])
    pre = Operand(3 * draw.values(rows, (1 + gated) * width), leading, "tokens", shift=draw.choice.randint(0, 1))
    backward, in_place = draw.flag(), draw.flag() and not gated
    type = "f64" if leading == "f64" else draw.type()

    def result(columns: int, type: str) -> Operand:
        return Operand((rows, columns), type, "tokens", shift=draw.choice.choice([0, 1, 3]))

    act = pre if in_place else result(width, type)
    dact = Operand(draw.values(rows, width), type, "tokens") if backward else None
    dpre = None if dact is None else dact if in_place else result(pre.columns, draw.type())

    def expected() -> dict[str, np.ndarray]:
        x, other = pre.read(), 1.0
        if gated:
            x, other = x[:, :width], x[:, width:]
        linear, cubic = (1.5957691216057308, 0.07135481627260025) if kind == "gelu_tanh" else (1.0, 0.0)
        share = 1 / (1 + np.exp(-x * (linear + cubic * x**2)))
        slope = share + x * share * (1 - share) * (linear + 3 * cubic * x * x)
        if kind == "gelu":
            share = 0.5 + 0.5 * np.vectorize(math.erf, otypes=[float])(x * 0.5**0.5)
            slope = share + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        out = {"act": x * share * other}
        if dact is not None:
            g = dact.read()
            out["dpre"] = np.concatenate([g * slope * other, g * x * share], 1) if gated else g * slope
        return out

    arguments = {"kind": kind, "rows": rows, "width": width, "pre": pre, "act": act, "dact": dact, "dpre": dpre}
    return Call("activation", arguments, expected, in_place=() if gated else (("act", "pre"), ("dpre", "dact")))


class Surgery:
    """K gradients in segments, some of them empty."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.K, self.type = draw, draw.clusters(), draw.type()
        most = 3000 if self.K < 10 else 700
        self.sizes = [draw.choice.choice([0, draw.size(most), draw.size(20)]) for _ in range(draw.choice.randint(0, 5))]
        shift = draw.choice.choice([0, 0, 1])
        self.operands = [
            Operand(draw.values(1, size), self.type, "whole", shift=shift) for size in self.sizes for _ in range(self.K)
        ]

    def argument(self) -> Gradients:
        return Gradients(TYPES[self.type], self.K, [x.address for x in self.operands], self.sizes)

    def whole(self) -> np.ndarray:
        """fp64 [K, P]"""
        rows = [[x.read()[0] for x in self.operands[k :: self.K]] for k in range(self.K)]
        return np.stack([np.concatenate([np.zeros(0), *row]) for row in rows])

    def matrix(self, *shape: int, result: bool = False) -> Operand:
        """fp64 numbers in one row."""
        size = int(np.prod(shape))
        return Operand((1, size) if result else self.draw.values(1, size), "f64", "whole")


def gram(draw: Draw) -> Call:
    surgery = Surgery(draw)
    out = surgery.matrix(surgery.K, surgery.K, result=True)

    def expected() -> dict[str, np.ndarray]:
        g = surgery.whole()
        return {"out": g @ g.T}

    arguments = {"gradients": surgery.argument(), "out": out}
    return Call("gram", arguments, expected, addresses=True, keeps=surgery.operands)


def combine(draw: Draw) -> Call:
    surgery = Surgery(draw)
    coefficients = surgery.matrix(surgery.K, surgery.K)
    segments = [x.read() for x in surgery.operands]
    K = surgery.K
    for x in surgery.operands:
        x.written = True

    def expected() -> dict[str, np.ndarray]:
        C = coefficients.read().reshape(K, K)
        combined = [C @ np.concatenate(segments[s : s + K]) for s in range(0, len(segments), K)]
        return {"gradients": np.concatenate([np.zeros(0), *(row for block in combined for row in block)])}

    arguments = {"gradients": surgery.argument(), "coefficients": coefficients}
    return Call("combine", arguments, expected if segments else None, addresses=True, keeps=surgery.operands)


def weighted_sum(draw: Draw) -> Call:
    surgery = Surgery(draw)
    weights = surgery.matrix(surgery.K)
    shift = draw.choice.choice([0, 0, 1])
    out = [Operand((1, size), surgery.type, "whole", shift=shift) for size in surgery.sizes]

    def expected() -> dict[str, np.ndarray]:
        return {"out_pointers": weights.read()[0] @ surgery.whole()}

    arguments = {"gradients": surgery.argument(), "weights": weights, "out_pointers": out}
    return Call("weighted_sum", arguments, expected if out else None, addresses=True, keeps=surgery.operands)


def pcgrad_coefficients(draw: Draw) -> Call:
    K = draw.clusters()
    vectors = draw.values(K, max(2, K // 2))
    gram = Operand((vectors @ vectors.T).reshape(1, -1), "f64", "whole")
    orders = [draw.numbers.permutation(np.delete(np.arange(K), i)) for i in range(K)]
    right = np.array([draw.choice.random() < 0.8 for _ in range(K)])
    for i in np.flatnonzero(~right) if K > 1 else []:
        orders[i][draw.choice.randrange(K - 1)] = draw.choice.choice([i, -1, K, 2**62, -(2**63)])
    order = Operand(np.array(orders, np.int64).reshape(1, -1), "i64", "whole")
    out = Operand((1, K * K), "f64", "whole")

    def expected() -> dict[str, np.ndarray]:
        G = gram.read().reshape(K, K)
        C = np.eye(K)
        for i in range(K):
            for j in orders[i] if right[i] or K == 1 else []:
                product = C[i] @ G[j]
                if product < 0:
                    C[i, j] -= product / G[j, j]
            if not right[i] and K > 1:
                C[i] = np.nan
        return {"out": C}

    arguments = {"clusters": K, "gram": gram, "order": order, "out": out}
    return Call("pcgrad_coefficients", arguments, expected, addresses=True)


def _kept(*operands: Operand | None) -> list[Operand]:
    return [x for x in operands if x is not None]


def _on_gpu(make: Callable[[Draw], Call], kernels: Any) -> Callable[[Draw], Call]:
    """The same call of the submodule, on its default stream."""

    def made(draw: Draw) -> Call:
        draw.slow = True
        call = make(draw)
        arguments = call.arguments
        if make is gram:
            size = issue(kernels, "cuda.gram_workspace", [arguments["gradients"]])
            arguments = arguments | {"workspace": Operand((1, size), "f64", "whole")}
        return replace(call, function=f"cuda.{call.function}", arguments=arguments | {"stream": 0})

    return made


def _gpu_workspace(draw: Draw) -> Call:
    surgery = Surgery(draw)
    return Call("cuda.gram_workspace", {"gradients": surgery.argument()}, addresses=True, keeps=surgery.operands)


def calls(kernels: Any) -> dict[str, Callable[[Draw], Call]]:
    """Return a maker of random calls for each function, for those of the submodule only if the extension has it."""
    ours = [norm_forward, norm_backward, residual_forward, residual_backward, activation]
    surgery = [gram, combine, weighted_sum, pcgrad_coefficients]
    makers = {make.__name__: make for make in [*ours, *surgery]}
    makers["build_config"] = lambda draw: Call("build_config", {})
    if hasattr(kernels, "cuda"):
        makers |= {f"cuda.{make.__name__}": _on_gpu(make, kernels) for make in surgery}
        makers["cuda.gram_workspace"] = _gpu_workspace
        makers["cuda.unsupported"] = lambda draw: Call("cuda.unsupported", {})
    return makers


# --- wrong calls -----------------------------------------------------------------------------------------------------

_HUGE = 1 << 62


def wrong(call: Call) -> Iterator[tuple[str, list[Any]]]:
    """Yield everything that the extension must refuse, one mistake at a time: the mistake and the arguments."""
    right = call.plain()

    def with_(name: str, value: Any) -> list[Any]:
        return list((right | {name: value}).values())

    arguments = list(right.values())
    yield "an argument too many", [*arguments, 0]
    if arguments:
        yield "an argument too few", arguments[:-1]
    for name, value in right.items():
        if not isinstance(value, bool | float):
            for bad in ("1", None, 1.5):
                yield f"{name} is {bad!r}", with_(name, bad)
        if isinstance(value, float):
            for bad in (float("nan"), float("inf"), -1.0):
                if right["shape"].N:
                    yield f"{name} is {bad}", with_(name, bad)
        if isinstance(value, Enum) and right["shape"].N:
            yield f"{name} is no type", with_(name, Enum(7))
    empty = right["shape"].N == 0 if "shape" in right else right.get("width") == 0
    if "shape" in right:
        for what, shape in _wrong_shapes(right["shape"], needed=bool(right.get("compact"))):
            yield what, with_("shape", shape)
    if "compact" in right and not empty:
        compact, keep, rms = right["compact"], right["keep_branch"], right["rms"]
        yield f"mean with rms={not rms}", with_("rms", not rms)
        if "inactive" in right and not rms:  # given to the one, missing for the other
            yield f"inactive with compact={not compact}", with_("compact", not compact)
        elif keep or not right["shape"].start:
            yield "compact with keep_branch, or without windows", with_("compact", True)
        if compact or call.arguments["branch"] is None:
            yield "keep_branch with compact, or without a branch", with_("keep_branch", True)
        if keep and "x_is_stream" in right:
            yield "x_is_stream with keep_branch", with_("x_is_stream", True)
    if "kind" in right:
        yield "an unknown kind", with_("kind", "relu")
        for name, size in itertools.product(("rows", "width"), (-1, _HUGE, 1 << 70)):
            yield f"{name} {size}", with_(name, size)
    if "clusters" in right:
        for clusters in (0, -1, 65, _HUGE):
            yield f"{clusters} clusters", with_("clusters", clusters)
    if "gradients" in right:
        for what, gradients in _wrong_gradients(right["gradients"], written=call.function.endswith("combine")):
            yield what, with_("gradients", gradients)
    if "out_pointers" in right:
        pointers = right["out_pointers"]
        yield "out_pointers too many", with_("out_pointers", [*pointers, 8])
        for i, size in enumerate(right["gradients"].sizes):
            if size:
                for what, bad in _wrong_addresses(pointers[i], 2):
                    yield f"out_pointers[{i}] {what}", with_("out_pointers", [*pointers[:i], bad, *pointers[i + 1 :]])
                first = right["gradients"].pointers[i * right["gradients"].clusters]
                yield "out_pointers overlap", with_("out_pointers", [*pointers[:i], first, *pointers[i + 1 :]])
    if empty:
        return
    for name, x in call.operands().items():
        if x.bytes == 0:
            continue
        if call.addresses:
            for what, bad in _wrong_addresses(x.address, x.itemsize):
                yield f"{name} {what}", with_(name, bad)
        else:
            for what, rows in _wrong_rows(right[name], x, optional=name in call.optional):
                yield f"{name} {what}", with_(name, rows)
        if x.written or name in ("act", "dpre"):
            for what, address in _overlaps(call, name, x):
                yield f"{name} {what}", with_(name, address if call.addresses else right[name]._replace(data=address))


def _wrong_addresses(address: int, itemsize: int, optional: bool = False) -> Iterator[tuple[str, int]]:
    if not optional:
        yield "null", 0
    if itemsize > 1:
        yield "misaligned", address + 1
    yield "at the end of the address space", (1 << 64) - 64
    yield "beyond the address space", 1 << 64
    yield "negative", -8


def _wrong_rows(rows: Rows, x: Operand, optional: bool) -> Iterator[tuple[str, Rows]]:
    for what, address in _wrong_addresses(x.address, x.itemsize, optional):
        yield what, rows._replace(data=address)
    for type in (7, -1):
        yield f"of type {type}", rows._replace(type=type)
    if x.kind != "tokens":
        yield "of another type", rows._replace(type=TYPES["f32" if x.type == "f64" else "f64"])
    if x.kind == "whole":
        yield "not contiguous", rows._replace(stride=x.stride + 1)
    yield "with stride 2**70", rows._replace(stride=1 << 70)
    if x.rows > 1:
        yield "with a huge stride", rows._replace(stride=_HUGE)
        yield "with a negative stride", rows._replace(stride=-1)
        if x.written:
            yield "with overlapping rows", rows._replace(stride=x.columns - 1)


def _wrong_shapes(shape: Shape, needed: bool) -> Iterator[tuple[str, Shape]]:
    wrong = {
        "B": (-1, _HUGE, 1 << 70),
        "N": (-1, _HUGE),
        "C": (0, -1, (1 << 24) + 1, _HUGE),
        "width": (0, -1, shape.C + 1, _HUGE),
        "chunk": (0, -1, _HUGE),
    }
    for name, values in wrong.items():
        for value in values:
            yield f"{name} {value}", shape._replace(**{name: value})
    if shape.start:
        yield "start misaligned", shape._replace(start=shape.start + 1)
        starts = np.frombuffer((ctypes.c_int32 * shape.B).from_address(shape.start), np.int32)
        if shape.width < shape.C:  # where it fits nowhere else, another width moves it out
            yield "a window beyond the channels", shape._replace(width=shape.C - int(starts.max()) + 1)
    if needed and shape.N:
        yield "no windows", shape._replace(start=0)


def _wrong_gradients(g: Gradients, written: bool) -> Iterator[tuple[str, Gradients]]:
    for type in (TYPES["f64"], 7, -1):
        yield f"type {type}", g._replace(type=type)
    for clusters in (0, -1, 65, _HUGE):
        yield f"{clusters} clusters", g._replace(clusters=clusters)
    yield "pointers too many", g._replace(pointers=[*g.pointers, 8])
    yield "sizes too many", g._replace(sizes=[*g.sizes, 8])
    for s in range(len(g.sizes)):
        for size in (-1, _HUGE, 1 << 70):
            yield f"sizes[{s}] {size}", g._replace(sizes=[*g.sizes[:s], size, *g.sizes[s + 1 :]])
    filled = [i for i in range(len(g.pointers)) if g.sizes[i // g.clusters]]
    for i in filled[:1] + filled[-1:]:
        bads = list(_wrong_addresses(g.pointers[i], 2))
        if written and len(filled) > 1:
            bads.append(("twice", g.pointers[filled[0] if i != filled[0] else filled[-1]]))
        for what, bad in bads:
            yield f"pointers[{i}] {what}", g._replace(pointers=[*g.pointers[:i], bad, *g.pointers[i + 1 :]])


def _overlaps(call: Call, name: str, x: Operand) -> Iterator[tuple[str, int]]:
    """Addresses at which a result would overlap another argument."""
    others = {other: y for other, y in call.operands().items() if other != name and y is not x}
    others |= {f"what arguments point to, {i}": y for i, y in enumerate(call.keeps)}
    for other, y in others.items():
        if y.bytes == 0:
            continue
        first = -(-y.address // x.itemsize) * x.itemsize
        last = (y.address + y.bytes - 1) // x.itemsize * x.itemsize
        for address in {first, last}:
            same = (name, other) in call.in_place or (other, name) in call.in_place
            if y.address <= address < y.address + y.bytes and not (same and address == y.address and x.type == y.type):
                yield f"overlaps {other}", address
