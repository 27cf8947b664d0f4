"""Try faults and print the table of docs/safety.md.

    python -m tests.faults                    # a few seconds for each kind of fault
    python -m tests.faults --seconds 600      # longer
    python -m tests.faults --only ranks       # those whose names hold a word

The exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from tests.faults.all import FAULTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind of fault (default: 10)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats a run (default: a new one)")
    parser.add_argument("--only", default="", metavar="WORD", help="only faults whose names hold it")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if arguments.only in fault.name]
    if not chosen:
        parser.error(
            f"argument --only: no fault's name holds {arguments.only!r}; there are: "
            + "; ".join(f.name for f in FAULTS)
        )
    print("| fault | afterwards | tried | survived |\n|---|---|---|---|")
    all_lost = []
    for fault in tqdm(chosen, "faults", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            tried, lost = fault.run(arguments.seed, Path(folder), arguments.seconds)
        tqdm.write(f"| {fault.name} | {fault.expected} | {tried:,} | {tried - len(lost):,} |")
        all_lost += [f"{fault.name} (--seed {arguments.seed}): {sentence}" for sentence in lost]
    print(*all_lost, sep="\n")
    return int(bool(all_lost))


if __name__ == "__main__":
    sys.exit(main())
