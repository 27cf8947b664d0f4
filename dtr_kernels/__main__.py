"""Command line: ``python -m dtr_kernels info``, ``verify`` and ``build``."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from dtr_kernels import info, just_in_time, verify


def main() -> int:
    """Runs the command given on the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dtr_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what runs on this machine and why")
    show.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser(
        "verify", help="compare the kernels with the reference here and print a table of errors"
    )
    check.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    check.add_argument("--kernels", action="store_true", help="every kernel in each of its modes, instead of blocks")
    check.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one, printed")
    commands.add_parser(
        "build",
        help="compile the extension for this machine, to be used in place of the installed one",
        description=just_in_time.build.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments = parser.parse_args()

    if arguments.command == "info":
        if arguments.json:
            print(json.dumps(info.collect(), indent=2))
        else:
            info.show()
        return 0
    if arguments.command == "build":
        just_in_time.build()
        return 0
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}")
    seed = torch.seed() % 2**31 if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    print(f"device {device}, seed {seed}\n")
    passed = verify.run(device, arguments.kernels)
    print("\nevery error is within its bound" if passed else "\nFAILED: an error is above its bound")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
