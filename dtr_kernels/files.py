"""Files that are written as a whole or not at all, are checked when read, and have one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dtr_kernels.quoting import shortened


def cache_folder() -> Path:
    """Return $DTR_KERNELS_CACHE, $XDG_CACHE_HOME/dtr_kernels or ~/.cache/dtr_kernels; it need not exist."""
    own, shared = os.environ.get("DTR_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    # An unknown home, as in some containers, stays "~", where no file is found.
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dtr_kernels"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; that file replaces ``path`` when it is complete and on the disk.

    Folders are made, a symbolic link is followed, and the file's permissions stay. A reader, and other threads and
    processes that write the same file, never find half of one. Drafts left behind by killed processes of this machine
    are deleted.

    Raises:
        OSError: naming the file, if it cannot be written, or is a folder, pipe or device. The old file stays as it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file; name another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_drafts_of_dead_processes(path)
    draft = path.with_name(f"{_drafts_of(path)}{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, draft)
        draft.replace(path)
    except OSError as error:
        if error.errno is not None and str(error.filename) in ("None", str(draft)):  # None of a write on a full disk
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # a name that is too long was never there
            draft.unlink(missing_ok=True)


def _drafts_of(path: Path) -> str:
    """Return the prefix of the names of this machine's drafts of a file."""
    return f".{path.name}.{socket.gethostname()}."


def _delete_drafts_of_dead_processes(path: Path) -> None:
    prefix = _drafts_of(path)
    with suppress(OSError):  # a folder that may not be listed
        for draft in path.parent.iterdir():
            pid = re.fullmatch(re.escape(prefix) + r"(\d+)\.\w+", draft.name)
            if pid and not _is_running(int(pid[1])):
                with suppress(OSError):  # somebody else's, or deleted meanwhile
                    draft.unlink()


def _is_running(pid: int) -> bool:
    # /proc may hide the processes of other users.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def locked(path: str | Path, busy: str) -> Iterator[None]:
    """Hold a lock on a file or folder: ``<path>.lock`` beside it. The system releases it when the process dies.

    All spellings of a path, and symbolic links to it, share one lock. Child processes that are forked meanwhile hold
    it too, and keep it if they outlive a killed parent. On a file system without locks nothing is held.

    Args:
        busy: the message of the error if another process or thread holds the lock.

    Raises:
        OSError: if no file can be made there.
        ValueError: if another process or thread holds the lock, or a file of that name is no lock.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size:
                raise ValueError(f"{lock} is in the place of a lock, but holds something else; name another path")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # the latter on SMB
                raise ValueError(busy) from None
            except OSError:
                pass  # no locks here
            if os.fstat(file).st_nlink == 0:  # deleted by its last holder: it locks nothing any more
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


@contextmanager
def expecting(what: str, path: str | Path, advice: str) -> Iterator[None]:
    """Turn any error while a file is read and understood into a ValueError that says what the file should hold.

    Args:
        what: the expected content.
        path: of the file.
        advice: what to do if the file holds something else.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if anything else goes wrong.
    """
    try:
        yield
    except Exception as error:  # other files fail in many ways
        if isinstance(error, OSError) and error.filename:  # without a name, zipfile was led out of the file
            raise
        reason = " ".join((str(error) if isinstance(error, ValueError) else repr(error)).split())
        raise ValueError(f"{path} does not hold {what}: {shortened(reason)}; {advice}") from error


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file, with numbers of at most 64 bits.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, if it is no regular file, not JSON in UTF-8, nested too deeply, or has a larger
            number.
    """
    check_no_device(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_int=_int64, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold JSON that this library has written: {shortened(error)}") from error


def check_no_device(path: str | Path) -> None:
    """Refuse folders, pipes and devices: a reader would wait at a pipe forever."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file; name another path")


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {shortened(digits)} has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if abs(number := float(digits)) == float("inf"):
        raise ValueError(f"the number {shortened(digits)} is larger than a float can be")
    return number


def write_tensors(state: object, path: str | Path) -> None:
    """Write what ``torch.save`` can, as a whole or not at all; ``torch.load`` reads it too.

    The comment of the archive is a SHA-256 digest: PyTorch does not check the checksums of a zip file, which do not
    cover the places and the kinds of its parts anyway.

    Raises:
        OSError: if it cannot be written, as on a full disk. The old file stays as it was.
    """
    with replacing(path) as draft:
        try:
            # Given a name, PyTorch writes by itself; given a Python file it would call back, where Ctrl-C may strike.
            torch.save(state, draft)
            with draft.open("r+b") as file:
                digest = _digest(file, draft.stat().st_size - 2)
                file.write(len(digest).to_bytes(2, "little") + digest)  # in place of an empty comment's length
        except (OSError, RuntimeError) as error:  # the latter of PyTorch's writer
            raise OSError(
                f"{path} could not be written; is the disk full, or the folder read-only? ({shortened(error)})"
            ) from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the hexadecimal digest of a file's first bytes, leaving the file positioned after them."""
    file.seek(0)
    digest = hashlib.sha256()
    while data := file.read(min(size, 1 << 20)):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest().encode()


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read what ``write_tensors`` has written: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if it is damaged or holds anything else.
    """
    check_no_device(path)
    try:
        with Path(path).open("rb") as file:
            digest = _digest(file, max(Path(path).stat().st_size - 66, 0))
            if file.read() != (64).to_bytes(2, "little") + digest:
                raise ValueError("its checksum is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # other files fail in many ways
        raise ValueError(f"{path} is damaged, or no file that this library has written: {shortened(error)}") from error
