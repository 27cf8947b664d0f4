"""Gradient surgery by many processes makes the update of one that has the whole batch (gloo, on a CPU).

The checks themselves are in distributed_checks.py: a group of processes is started once and runs all of its checks.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("NOT RUN: this PyTorch has no torch.distributed with gloo", allow_module_level=True)

import distributed_checks
from processes import run_ranks

SEED = int(os.environ.get("DTR_TEST_SEED", torch.seed() % 2**31))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """For a number of processes, how each check ended on each rank."""

    @cache
    def run(world_size):
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        run_ranks(distributed_checks.work, world_size, world_size, str(folder), SEED)
        return [json.loads(Path(folder, f"ended.{rank}").read_text()) for rank in range(world_size)]

    return run


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(size, function.__name__) for size, functions in distributed_checks.CHECKS.items() for function in functions],
)
def test_on_all_ranks(ended, world_size, name):
    print(f"DTR_TEST_SEED={SEED}")
    for rank, checks in enumerate(ended(world_size)):
        if name not in checks:
            pytest.fail(f"NOT RUN on rank {rank}, because an earlier check failed there: {list(checks)[-1]}")
        assert not checks[name], f"on rank {rank}:\n{checks[name]}"
