"""The whole method on real images: ``python -m benchmarks study``.

plan        what is compared, and at which size
judge       how good a model is
units       the pieces of work, each done once
findings    from numbers to sentences, tables and the README
page        everything in one picture
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import environment
from benchmarks.study import findings
from benchmarks.study.plan import PLANS

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line of ``study`` takes."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that everything works")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the study, where an interrupted one goes on; default: out/study/quick, cpu or cuda",
    )


def main(arguments: argparse.Namespace) -> int:
    """Trains what has not been trained yet, and writes study.json, study.md and study.png.

    Returns:
        0; 130 after Ctrl-C.

    Raises:
        ValueError: if there is no such device, or the folder holds another study.
        ImportError: without scikit-learn, matplotlib and tqdm.
    """
    # Here, because the other commands must work without these.
    from tqdm import tqdm

    from benchmarks.study.units import Interrupted, Study

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    plan = PLANS["quick" if arguments.quick else device.type]
    folder = arguments.out or Path("out/study") / plan.name
    try:
        study = Study(plan, folder, device)
        units = dict(study.units())
        with tqdm(units.items(), "study", unit="unit") as bar:
            for name, function in bar:
                bar.set_postfix_str(name)
                if not study.done(name):
                    study.do(name, function)
    except (KeyboardInterrupt, Interrupted):
        print(f"interrupted; the same command goes on from here, with what is in {folder}")
        return 130
    found = findings.collect(plan, study.findings(), environment.describe(device))
    write(found, folder, study.samples())
    print(findings.markdown(found))
    print(f"results are in {folder}")
    return 0


def write(study: dict[str, Any], folder: Path, samples: dict[str, Tensor]) -> None:
    """The figures as JSON, and as a page in words and a picture."""
    from benchmarks.study import page

    (folder / "study.json").write_text(json.dumps(study) + "\n")
    (folder / "study.md").write_text(findings.markdown(study))
    page.draw(study, samples, folder / "study.png")
