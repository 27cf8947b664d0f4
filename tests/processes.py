"""Functions that several processes run at once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import torch.multiprocessing

# Slow imports happen once, in a process of which the others are forks.
_IMPORTED = [
    "dtr_kernels",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "examples.train",
]


def forks() -> ForkServerContext:
    """Return what starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def run_ranks(function, size, *args):
    """Call function(rank, *args) in so many processes; an exception in one is raised here."""
    forks()
    torch.multiprocessing.start_processes(function, args, size, start_method="forkserver")
