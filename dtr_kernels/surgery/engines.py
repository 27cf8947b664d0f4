"""Choice of the engine that computes the K gradients: by name, or the faster one on this model and device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch

from dtr_kernels.quoting import quoted

ENGINES = ("auto", "per_cluster", "one_pass", "low_memory")
# Steps on which each candidate is timed; the first warms up and is not counted.
_TRIALS = 4

Result = TypeVar("Result")


class EngineChoice:
    """The engine of one ``GradientSurgery``.

    Args:
        name: one of ``ENGINES``. With "auto" the first steps alternate between "per_cluster" and "one_pass", and
            ``name`` then becomes the engine with the smaller median time; or "per_cluster" as soon as "one_pass" fails
            and "per_cluster" does not: refused, out of memory, or any other error.

    Raises:
        ValueError: if the name is unknown.
    """

    def __init__(self, name: str) -> None:
        if name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {name!r}")
        self.name = name
        # The reason for the choice, in words.
        self.reason = "measured in the first steps" if name == "auto" else "as asked for"
        self._auto = name == "auto"
        self._seconds: dict[str, list[float]] = {"per_cluster": [], "one_pass": []}
        # The engine of the step in progress, which all its micro-batches share.
        self._current = name

    def run(
        self,
        per_cluster: Callable[[], Result],
        one_pass: Callable[[], Result],
        start_over: Callable[[], None] | None,
        device: torch.device,
    ) -> Result:
        """Call the chosen engine, or the next one to be timed.

        Args:
            per_cluster, one_pass: compute the gradients of a micro-batch.
            start_over: undoes the writes of a refused one_pass. None from a step's second micro-batch on, since it
                would also undo the earlier ones; those micro-batches are not timed either.
            device: the host waits for its work while a step is timed.

        Raises:
            Whatever per_cluster raises; and the errors of one_pass if it was asked for by name, or fails in a step's
            later micro-batch. With "auto" the next step then uses per_cluster.
        """
        if start_over is not None:
            # With "auto", the engine that was timed less often.
            self._current = (
                min(self._seconds, key=lambda n: len(self._seconds[n])) if self.name == "auto" else self.name
            )
        engine = one_pass if self._current == "one_pass" else per_cluster
        trial = self.name == "auto" and start_over is not None
        try:
            return self._timed(engine, device) if trial else engine()
        except Exception as error:
            if not self._auto or self._current == "per_cluster":
                raise
            reason = f"one_pass failed: {type(error).__name__}: {error}"
            if start_over is None:
                self.name, self.reason = "per_cluster", reason
                raise
        # Outside of the handler, because the caught error keeps the failed graph in memory.
        start_over()
        result = per_cluster()  # the caller's own error comes again here, and does not decide the engine
        self.name = self._current = "per_cluster"
        self.reason = reason
        return result

    def _timed(self, engine: Callable[[], Result], device: torch.device) -> Result:
        begin = _now(device)
        result = engine()
        self._seconds[self._current].append(_now(device) - begin)
        if all(len(times) == _TRIALS for times in self._seconds.values()):
            medians = {name: median(times[1:]) for name, times in self._seconds.items()}
            # self._current stays: the step in progress keeps its engine.
            self.name = min(medians, key=lambda name: medians[name])
            self.reason = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items())
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the choice that "auto" has made, empty if there is none."""
        found = self._auto and self.name != "auto"
        return {"name": self.name, "reason": self.reason} if found else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the engine that "auto" chose in the saved run, unless an engine was named here.

        Raises:
            ValueError: if the saved name is not an engine.
        """
        if self._auto and state:
            name, reason = state["name"], state["reason"]
            if name not in self._seconds:
                raise ValueError(f"engine must be one of {', '.join(map(repr, self._seconds))}, got {quoted(name)}")
            self.name, self.reason = name, reason


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
