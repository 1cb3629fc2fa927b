"""Files that are whole or not there, and the places for them. A library, for all that writes."""

from cli.errors import UserError, require

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class _Output(io.BufferedWriter):
    """A binary file that remembers why it could not be written: torch's writer hides the cause."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Writes `path` whole or not at all: a temporary file, fsynced, then renamed over it.

    An OSError names the file and is the cause itself, whatever the writer made of it.
    """
    path = Path(path)
    # This process's own, never a stranger's file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    output = None
    try:
        output = _Output(io.FileIO(partial, "w"))
        # The same bytes on every system: no "\r\n", which would change a checksum.
        file = output if "b" in mode else io.TextIOWrapper(output, encoding="utf-8", newline="\n")
        yield file
        file.flush()
        os.fsync(output.fileno())
        file.close()
        os.replace(partial, path)
    except BaseException as problem:
        cause = problem if isinstance(problem, OSError) else output and output.error
        if output is not None:
            with suppress(OSError):  # closing writes what is left
                output.close()
        partial.unlink(missing_ok=True)
        if isinstance(cause, OSError):
            cause.filename = str(path) if output and cause is output.error else (
                cause.filename or str(path))
            raise cause from (None if cause is problem else problem)
        raise


def write_json(path: str | Path, contents: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with atomic_file(path, "w") as file:
        json.dump(contents, file, indent=1)


def check_links(path: str | Path, flag_name: str) -> None:
    """Refuses a path that leads over a link to nowhere: what is there may be gone for a while (a
    volume that is not mounted), and must not be made in its place."""
    path = Path(path).absolute()
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(f"{part} is a link to {os.readlink(part)}, which does not exist: mend "
                            f"it, or choose another place with {flag_name}")


def check_file(path: str | Path, flag_name: str) -> None:
    """Makes sure, before any work, that this file can be written; its folder must be there."""
    path = Path(path)
    check_links(path, flag_name)
    require(path.parent.is_dir() and not path.is_dir(),
            f"{flag_name} {path}: name a file in a folder that exists")
    check_writable(path.parent, flag_name)


def check_writable(folder: str | Path, flag_name: str) -> None:
    """Makes sure, before any work, that files can be written into the folder or that it can be
    created; creates nothing itself."""
    check_links(folder, flag_name)
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        probe = existing / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder "
                        f"with {flag_name}") from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces (hashlib.file_digest is not in Python 3.10)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
