"""Registration of functions with torch.library, for eager mode, autograd, autocast and torch.compile.

``torch.library.custom_op`` would do the same, but checks for aliasing at every call, which takes longer than a small
block's kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("dtr_kernels", "FRAGMENT")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


class Op:
    """``torch.ops.dtr_kernels.<name>``, computed by ``function`` on CPUs and GPUs.

    ``function`` writes only to the arguments named in ``mutates``, and returns new tensors, which share no memory with
    an input or another output.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        self.name = name
        _library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for device in ("CPU", "CUDA"):
            _library.impl(name, _without_autocast(function), device)
        self._overload = getattr(torch.ops.dtr_kernels, name).default

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the shapes and dtypes of the outputs for tracing; a decorator."""
        torch.library.register_fake(f"dtr_kernels::{self.name}", function, lib=_library)
        return function

    def register_flops(self, formula: Callable[..., int]) -> None:
        """Register the FLOPs of the op's matrix products for ``torch.utils.flop_counter``; a decorator.

        The formula takes the op's arguments, with shapes in place of tensors. It counts the products of the plain model
        over active channels: W of C even if a dense GEMM is faster, without the closed form of deactivated channels.
        """
        register_flop_formula(getattr(torch.ops.dtr_kernels, self.name))(
            lambda *args, out_shape=None, **kwargs: formula(*args, **kwargs)
        )

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register the backward pass, as in ``torch.library.register_autograd``."""
        torch.library.register_autograd(
            f"dtr_kernels::{self.name}", backward, setup_context=setup_context, lib=_library
        )

    def refuse_autograd(self) -> None:
        """Make differentiating a backward op an error instead of a silent zero."""

        def refuse(*_: Any) -> None:
            raise RuntimeError(
                f"{self.name} cannot be differentiated: the fused ops have no second derivative; "
                "take it through dtr_kernels.reference"
            )

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def register_autocast(self, casts: tuple[int, ...]) -> None:
        """Cast the arguments number ``casts`` (weights and biases) under autocast, and nothing else.

        The residual stream keeps its dtype, and the op computes its GEMMs in the dtype of the given weights.
        PyTorch's own ``torch.library.register_autocast`` would cast the residual stream too.
        """
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _library.impl(self.name, self._with_casts(casts, device), key, with_keyset=True)

    def _with_casts(self, casts: tuple[int, ...], device: str) -> Callable[..., Any]:
        def function(_: Any, *args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            wide = args[0].dtype == torch.float64  # autocast never casts fp64
            cast = [a.to(dtype) if i in casts and a is not None and not wide else a for i, a in enumerate(args)]
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return self._overload(*cast)

        return function


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return function with autocast off inside: a backward pass may run under autocast, but its GEMMs choose their own
    dtypes."""

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return function(*args)

    return kernel


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Register a function as ``torch.ops.dtr_kernels.<name>``; a decorator."""
    return lambda function: Op(name, function, mutates)
