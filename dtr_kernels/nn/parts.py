"""Parts of our modules whose parameters kernels read instead of calling them: changes to the parts are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dtr_kernels.ops.dispatch import is_wrapper


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is exactly a linear layer of its weight and bias, so that it need not be called."""
    return (
        type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not is_wrapper(module.weight)  # type: ignore[arg-type]
    )


_NORMS = (nn.LayerNorm, nn.RMSNorm)


class ReadParts:
    """Parts of a module whose parameters the kernels read.

    Args:
        kinds: the class of each part by its path within the module; kernels replace the forward of that class.
        affine: whether the kernels support affine parameters of norms.
    """

    def __init__(self, kinds: Mapping[str, type[nn.Module]], affine: bool = False) -> None:
        self._affine = affine
        self._parts = [(path, path.split("."), kind.forward) for path, kind in kinds.items()]

    def refuse_changes(self, module: nn.Module) -> None:
        """Raise RuntimeError if calling a part would compute something else than its parameters say.

        An adapter (LoRA) may have replaced the part, or it may have been patched or given hooks.
        """
        for path, names, forward in self._parts:
            part: Any = module
            for name in names:
                part = getattr(part, name)
            if type(part).forward is not forward or "forward" in part.__dict__:
                found = f"is {type(part).__module__}.{type(part).__qualname__}, or was patched"
            elif part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                found = "has hooks"
            elif not self._affine and isinstance(part, _NORMS) and part.weight is not None:
                found = "has affine parameters"
            else:
                continue
            raise RuntimeError(
                f"{path} of a {module._get_name()} {found}, but the kernels read its parameters and do not call it; "
                "merge what was added into its weight, or add it where modules are called, such as the block itself, "
                "attn.proj and adaLN_modulation"
            )
