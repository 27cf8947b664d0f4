"""The whole method on real images: ``python -m benchmarks study``.

plan        the methods, and the sizes at which they are compared
judge       the quality of a model
units       the pieces of work, each done once
inner       the study of scope "inner"
findings    from numbers to sentences, tables and the README
page        all results in one picture
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import sources
from benchmarks.study import findings
from benchmarks.study.inner import INNER_PLANS
from benchmarks.study.plan import PLANS
from dtr_kernels.files import locked, replacing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``study``."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that everything works")
    parser.add_argument(
        "--inner", action="store_true", help='scope "inner" against narrower models, at equal steps and at equal time'
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the study, where an interrupted one goes on; default: out/study/quick, cpu or cuda",
    )


def main(arguments: argparse.Namespace) -> int:
    """Train what has not been trained yet, and write the findings: JSON, a page in words and one in pictures.

    The whole study without ``--out`` also writes them to docs/study.

    Returns:
        0; 130 after Ctrl-C.

    Raises:
        ValueError: if there is no such device, the folder holds another study or another process uses it, or a file in
            it is damaged.
        OSError: if a file cannot be read or written.
        ImportError: without scikit-learn, matplotlib and tqdm.
    """
    # Imported here, because the other commands must work without these.
    from tqdm import tqdm

    from benchmarks.study.units import InnerStudy, Interrupted, Study

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    kind, plans = (InnerStudy, INNER_PLANS) if arguments.inner else (Study, PLANS)
    plan = plans["quick" if arguments.quick else device.type]
    folder = arguments.out or Path("out/study") / plan.name
    docs = [] if arguments.quick or arguments.out else [sources.ROOT / findings.DOCS]
    busy = f"another process works on the study in {folder}; wait until it has ended, or give another --out"
    with locked(folder / "study", busy):
        try:
            study = kind(plan, folder, device)
            study.findings()  # refuse damaged files before the work
            with tqdm(dict(study.units()).items(), "study", unit="unit") as bar:
                for name, function in bar:
                    bar.set_postfix_str(name)
                    if not study.done(name):
                        study.do(name, function)
        except (KeyboardInterrupt, Interrupted):
            print(f"interrupted; the same command goes on from here, with what is in {folder}")
            return 130
        found = study.collected()
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
        texts = {"json": "{\n" + ",\n".join(lines) + "\n}\n", "md": study.markdown(found)}
        for target in [folder, *docs]:
            for ending, text in texts.items():
                with replacing(target / f"{plan.name}.{ending}") as draft:
                    draft.write_text(text, encoding="utf-8")
            study.draw(found, target / f"{plan.name}.png")
            print(f"results are in {target}")
    print(f"\n{findings.as_table(found)}\n")
    print("\n".join(study.sentences(found)))
    return 0
