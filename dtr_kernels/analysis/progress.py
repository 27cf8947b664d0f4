"""The progress of an analysis of hours, in a file that neither Ctrl-C nor a kill can break."""

from __future__ import annotations

import dataclasses
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtr_kernels.files import check_no_device, expecting, locked, read_tensors, write_tensors
from dtr_kernels.quoting import shortened

FORMAT = 2
_SECONDS_BETWEEN_SAVES = 30.0


@dataclass(frozen=True)
class Progress:
    """The results so far, replaced as a whole, so that an exception at any moment finds them consistent.

    Attributes:
        start: number of elements of the flattened parameters whose products are in ``gram``.
        gram: fp64 [n, n].
        losses: fp64 [n], NaN if not yet computed.
        width: elements of the chunk in progress, which begins at ``start``; 0 between chunks.
        rows: number of timesteps whose gradients the chunk's buffer [n, width] holds.
    """

    start: int
    gram: Tensor
    losses: Tensor
    width: int = 0
    rows: int = 0

    @classmethod
    def none(cls, n: int) -> Progress:
        """Return the progress of an analysis of n timesteps before it begins."""
        return cls(0, torch.zeros(n, n, dtype=torch.float64), torch.full((n,), torch.nan, dtype=torch.float64))


class Checkpoint:
    """The file of an analysis and, while a chunk is in progress, ``<path>.rows`` with its gradients.

    A row is written once, so that a save writes only new rows, not the whole buffer. The file holds the checksums of
    the rows that count, and is replaced after the rows are on the disk.

    Args:
        path: of the file; None keeps nothing.
        problem: the computed problem, as strings, numbers and lists; a file of another problem is refused.
    """

    def __init__(self, path: str | Path | None, problem: Mapping[str, Any]) -> None:
        # Resolved once, so that neither a changed link nor another working folder moves the rows.
        self.path = None if path is None else Path(os.path.realpath(path))
        self._problem = {"format": FORMAT, **problem}
        self._saved: Progress | None = None
        self._checksums: list[int] = []  # of the rows in their file
        self._saved_at = time.monotonic()

    def locked(self) -> AbstractContextManager[None]:
        """Lock the files for one analysis.

        Raises:
            ValueError: if another analysis holds them.
        """
        busy = f"another analysis is using path {self.path}; wait until it has ended, or name another path"
        return nullcontext() if self.path is None else locked(self.path, busy)

    def load(self) -> Progress | None:
        """Return the progress in the file; None if there is no file.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it holds anything but the progress of this problem, or the file of rows is another's.
        """
        if self.path is None:
            return None
        if not self.path.exists():
            if self._rows_path.exists():
                raise ValueError(f"{self._rows_path} is no part of an analysis in {self.path}; name another path")
            return None
        advice = "name another path, or delete the file to begin anew"
        with expecting("the progress of task_affinity", self.path, advice):
            stored = read_tensors(self.path)
            if not (difference := _difference(stored["problem"], self._problem)):
                self._saved, self._checksums = Progress(**stored["progress"]), list(stored["checksums"])
        if difference:
            raise ValueError(f"{self.path} holds the progress of another analysis: {difference}; {advice}")
        return self._saved

    def load_rows(self, buffer: Tensor, rows: int) -> int:
        """Fill the first rows of the buffer; return how many of them the file holds undamaged."""
        held = 0
        check_no_device(self._rows_path)
        if rows and self._rows_path.exists():
            with self._rows_path.open("rb") as file:
                while held < rows and zlib.crc32(data := file.read(buffer[held].nbytes)) == self._checksums[held]:
                    buffer[held].copy_(torch.frombuffer(bytearray(data), dtype=buffer.dtype))
                    held += 1
        if self._saved:
            self._saved = dataclasses.replace(self._saved, rows=held)
        return held

    def save_if_due(self, progress: Progress, buffer: Tensor) -> None:
        """Save, unless the last save was less than half a minute ago."""
        if time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_SAVES:
            self.save(progress, buffer)

    def save(self, progress: Progress, buffer: Tensor | None = None) -> None:
        """Save ``progress`` and the rows of ``buffer`` that it counts."""
        if self.path is None:
            return
        kept = 0
        if self._saved and self._saved.rows:
            if (self._saved.start, self._saved.width) == (progress.start, progress.width):
                kept = self._saved.rows
            else:  # rows of another chunk are about to be overwritten, so the file must not count them
                self._write(dataclasses.replace(progress, rows=0))
        if buffer is not None and progress.rows > kept:
            self._write_rows(buffer[kept : progress.rows], kept)
        self._write(progress)
        if progress.rows == 0:
            self._rows_path.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def _write(self, progress: Progress) -> None:
        assert self.path is not None
        checksums = self._checksums[: progress.rows]
        write_tensors({"problem": self._problem, "progress": vars(progress), "checksums": checksums}, self.path)
        self._saved = progress

    def _write_rows(self, rows: Tensor, first: int) -> None:
        self._rows_path.touch()
        del self._checksums[first:]
        with self._rows_path.open("r+b") as file:
            file.seek(first * rows[0].nbytes)
            for row in rows:
                data = row.cpu().view(torch.uint8).numpy().data
                file.write(data)
                self._checksums.append(zlib.crc32(data))
            file.flush()
            os.fsync(file.fileno())

    @property
    def _rows_path(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.rows")


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return the first difference between two problems, in words; None if there is none."""
    for name, value in here.items():
        if isinstance(value, list):
            for i, (old, new) in enumerate(zip_longest(there[name], value, fillvalue="none")):
                if old != new:
                    return f"{name}[{i}] is {shortened(old)} there and {new} here"
        elif there[name] != value:
            return f"{name} is {shortened(there[name])} there and {value} here"
    return None
