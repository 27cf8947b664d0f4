"""How often clusters conflict, counted by hand, and the picture of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusals import refused

import dtr_kernels as dtr


def gram(*gradients):
    g = torch.tensor(gradients, dtype=torch.float64)
    return g @ g.T


EAST, NORTH, WEST, NONE = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.1), (0.0, 0.0)
GRAMS = [
    gram(EAST, NORTH, WEST),
    gram(EAST, WEST, NONE),
    gram(EAST, EAST, WEST),
    gram(WEST, NORTH, WEST),
    torch.full((3, 3), math.nan, dtype=torch.float64),  # of steps that GradScaler skipped
    gram(EAST, NORTH, WEST) * math.inf,
]


@pytest.mark.parametrize("given", [list, iter, torch.stack], ids=["list", "iterator", "tensor"])
def test_fractions(device, given):
    found = dtr.conflict_fractions(given([each.to(device) for each in GRAMS]))
    assert found.dtype == torch.float64 and found.device.type == device.type
    assert found.tolist() == [[0, 1 / 4, 2 / 3], [1 / 4, 0, 1 / 3], [2 / 3, 1 / 3, 0]]


def test_a_cluster_that_never_has_a_gradient():
    found = dtr.conflict_fractions([gram(EAST, WEST, NONE)])
    assert found[0, 1] == 1 and found[2].isnan().all() and found[:2, :2].isfinite().all()


@pytest.mark.parametrize(
    "weighting", ["pcgrad", "sum", lambda gram: gram.zero_()[0] + 1], ids=["pcgrad", "sum", "in place"]
)
def test_those_of_surgery(seed, weighting):
    p = torch.nn.Parameter(torch.ones(2))
    surgery = dtr.GradientSurgery([p], 2, weighting)
    surgery.backward([p.sum(), -p.sum()])
    assert dtr.conflict_fractions([surgery.last_gram])[0, 1] == 1


@pytest.mark.parametrize(
    "grams, error, fragments",
    [
        ([], ValueError, ["grams must hold", "at least one step"]),
        ([None], TypeError, ["grams must be floating-point tensors", "NoneType of step 0"]),
        ([torch.ones(2, 2, dtype=torch.int64)], TypeError, ["torch.int64 of step 0"]),
        (torch.ones(3, 3), ValueError, ["[S, K, K]", "got [3] of step 0"]),
        ([torch.ones(2, 3)], ValueError, ["[S, K, K]", "got [2, 3] of step 0"]),
        ([torch.ones(2, 2), torch.ones(3, 3)], ValueError, ["[S, K, K]", "got [3, 3] of step 1"]),
    ],
    ids=str,
)
def test_bad_grams(grams, error, fragments):
    refused(lambda: dtr.conflict_fractions(grams), error, fragments)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    figure = dtr.plot_conflicts(iter(GRAMS), tmp_path / "conflicts.png")
    axes = figure.axes[0]
    (image,) = axes.images
    no = np.nan
    expected = [[0, 1, 0, 0, no, no], [0, no, 1, 0, no, no], [1, no, 1, 0, no, no]]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 and 1", "1 and 2", "0 and 2"]
    assert np.abs(np.subtract(axes.get_facecolor(), image.cmap(0.0))).max() > 0.1, "no gradient looks like no conflict"
    assert image.get_extent() == [0, 6, -0.5, 2.5] and "3 clusters" in axes.get_title()
    assert (tmp_path / "conflicts.png").stat().st_size > 5000
    refused(lambda: dtr.plot_conflicts([torch.ones(1, 1)]), ValueError, ["at least two clusters"])


def test_picture_of_a_long_training(seed):
    """Each column is of a part of the steps."""
    pytest.importorskip("matplotlib")
    grams = [gram(EAST, WEST if step < 100 else NORTH) for step in range(1000)]
    (image,) = dtr.plot_conflicts(grams).axes[0].images
    assert image.get_array().tolist() == [[1] * 5 + [0] * 45]
    many = dtr.plot_conflicts(torch.eye(20).expand(3, -1, -1)).axes[0]
    assert not many.get_yticks().size
