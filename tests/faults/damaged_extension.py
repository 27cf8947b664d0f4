"""A process that damages the extension in the cache again and again, and prints a line for each time that it was tried
to be loaded; loading half of one would end the process."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Iterator

from dtr_kernels import just_in_time
from dtr_kernels.ops import extension


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return other contents of a file."""
    bits = bytearray(content)
    match rng.randrange(3):
        case 0:
            return content[: rng.randrange(len(content))]
        case 1:
            del bits[: rng.randrange(1, len(content))]
        case 2:
            for place in rng.sample(range(len(content)), 3):
                bits[place] ^= 1 << rng.randrange(8)
    return bytes(bits)


def loads(seed: int) -> Iterator[tuple[str, str | None]]:
    rng = random.Random(seed)
    file = just_in_time.path()
    file.parent.mkdir(parents=True, mode=0o755)
    description = just_in_time._description_of(file)
    shutil.copyfile(extension.kernels.__file__, file)
    description.write_text(json.dumps(just_in_time._described(file)))
    right = {path: path.read_bytes() for path in (file, description)}
    loaded = sys.modules["dtr_kernels._C"]
    while True:
        path = rng.choice([file, file, description])
        state = rng.getrandbits(64)
        path.write_bytes(damaged(random.Random(state), right[path]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            just_in_time.load()
        refused = [str(warning.message) for warning in caught]
        kept = sys.modules["dtr_kernels._C"] is loaded and "is not as it was built" in "".join(refused)
        path.write_bytes(right[path])
        yield path.name, None if kept else f"{path.name}, damaged by {state}: loaded, with {refused}"


if __name__ == "__main__":
    os.umask(0o022)
    for outcome in loads(int(sys.argv[1])):
        print(json.dumps(outcome), flush=True)
