"""Locks on folders and files, against a second process. A library, for all that writes folders."""

from cli.errors import UserError, require

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def _locked(path: Path, folder: str | Path, flag_name: str, again: bool = True) -> IO:
    """The lock's file, open and locked."""
    try:
        file = open(path, "a+", encoding="ascii")
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder "
                        f"with {flag_name}") from error
    try:
        lock_file(file)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        holder = "?"  # it has just ended and removed the file: once more
    except BlockingIOError:
        file.seek(0)
        holder, again = file.read().strip() or "?", False
    except OSError as error:  # a file system without locks
        print(f"{folder} cannot be locked ({error.strerror}): take care that no other process "
              "writes there", file=sys.stderr)
        return file
    file.close()
    require(again, f"process {holder} is at work in {folder}: wait for it, or choose another "
                   f"folder with {flag_name}")
    return _locked(path, folder, flag_name, again=False)


@contextmanager
def lock(folder: str | Path, flag_name: str) -> Iterator[None]:
    """Holds a folder for this process alone; raises UserError naming the one that has it.

    The lock is the operating system's, on the file `.lock` in the folder: it ends with the process,
    however that ends; the file that a killed one leaves means nothing.
    """
    path = Path(folder) / ".lock"
    with _locked(path, folder, flag_name) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()


def lock_file(file: IO) -> None:
    """Locks a file until it is closed or the process ends. Raises BlockingIOError if another
    process has it, another OSError where the file system knows no locks."""
    if sys.platform == "win32":
        import msvcrt
        file.seek(2**20)  # a byte far behind the text, which others must be able to read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            file.seek(0)
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
