"""Command line: ``dtr-kernels info``, ``verify`` and ``build``; ``python -m dtr_kernels`` takes the same."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import torch

import dtr_kernels
from dtr_kernels import info, just_in_time, ops, verify
from dtr_kernels.ops.declaration import PRECISIONS, SIZES, Sizes


def sizes(text: str) -> Sizes:
    """Return B, N and C of a text such as 4x256x1152."""
    return Sizes(*map(int, text.split("x")))


def main() -> int:
    """Run the command given on the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="dtr-kernels")
    parser.add_argument("--version", action="version", version=f"dtr_kernels {dtr_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what runs on this machine and why")
    show.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser(
        "verify", help="compare the kernels with the reference here and print a table of errors"
    )
    check.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    check.add_argument(
        "--kernels",
        nargs="*",
        metavar="NAME",
        help="each mode of every kernel, or of those named, instead of blocks; a process that CUDA fails starts again",
    )
    check.add_argument("--dtype", choices=[*PRECISIONS, "autocast"], help="of --kernels; default: all")
    check.add_argument(
        "--sizes",
        nargs="+",
        type=sizes,
        metavar="BxNxC",
        help="samples, tokens and channels for --kernels of blocks; default: small and odd ones",
    )
    check.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one, printed")
    check.add_argument("--after", nargs=2, type=int, default=(0, 0), help=argparse.SUPPRESS)
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
    kernels = None
    if arguments.kernels is not None:
        known = {kernel.name: kernel for kernel in ops.KERNELS}
        if unknown := set(arguments.kernels) - set(known):
            parser.error(f"--kernels: there is no {unknown.pop()}; there are {', '.join(known)}")
        kernels = [known[name] for name in arguments.kernels or known]
        if arguments.sizes:
            kernels = [replace(k, sizes=arguments.sizes) if k.sizes is SIZES else k for k in kernels]
    elif arguments.dtype or arguments.sizes:
        parser.error("--dtype and --sizes are for single kernels; add --kernels")
    seed = torch.seed() % 2**31 if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    print(f"device {device}, seed {seed}\n")
    passed = verify.run(device, kernels, arguments.dtype, arguments.after)
    print("\nevery error is within its bound" if passed else "\nFAILED: an error is above its bound")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
