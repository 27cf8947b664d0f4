"""Refusal of TorchScript, shared by our own modules and swapped ones."""

from __future__ import annotations

from typing import Any, NoReturn


class NoTorchScript:
    """Base of modules that raise an error if they are scripted or traced.

    Both methods are torch.nn.Module's own hooks, called by torch.jit alone, so that an ordinary call costs nothing.
    """

    def __prepare_scriptable__(self) -> NoReturn:
        self._refuse("scripted by torch.jit.script")

    def _slow_forward(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("traced by torch.jit.trace, on which torch.onnx.export(dynamo=False) is built too")

    def _refuse(self: Any, what: str) -> NoReturn:
        raise RuntimeError(
            f"{self._get_name()} cannot be {what}: windows and the choice of kernels depend on each call; use "
            "torch.export.export or torch.compile"
        )
