"""Functions that run in several processes at once."""

from __future__ import annotations

import multiprocessing

import torch.multiprocessing

# Slow imports happen once, in a process of which the others are forks.
_IMPORTED = ["dtr_kernels", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


def run_ranks(function, size, *args):
    """Call function(rank, *args) in so many processes; an exception in one is raised here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(function, args, size, start_method="forkserver")
