"""What every command line here shares: flags made from a dataclass, one-line errors, safe writes.

Nothing in this file knows about models or data, and it needs only the standard library, so that
the device scripts can use it too.
"""

import argparse
import dataclasses
import errno
import io
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

Config = TypeVar("Config")

# Errors of the machine that a user can mend, as against a bug of ours, which keeps its traceback.
_USER_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR,
                errno.ENOTDIR, errno.ENAMETOOLONG}


class UserError(Exception):
    """Something that the user can mend. `run` prints it as one line and exits with `status`."""

    status = 2


class Stopped(UserError):
    """The work ended early although the input was fine (diverged, interrupted)."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def flag(default: Any, help: str, choices: Sequence | None = None) -> Any:
    """A dataclass field that `parse` turns into a command-line flag."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        # argparse would print the whole usage first; the one line that matters drowns in it.
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parse(cls: type[Config], doc: str | None, argv: Sequence[str] | None = None,
          ) -> tuple[Config, set[str]]:
    """Reads `cls` from the command line; every field made by `flag` is one flag of the same name.

    Returns the configuration and the names of the fields that were given explicitly (a resumed
    run keeps its stored settings for all the others).
    """
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind, options = hints[field.name], {}
        default = (field.default_factory() if callable(field.default_factory) else field.default)
        if isinstance(kind, types.UnionType):  # `int | None`: None means "decided at run time"
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options.update(nargs="+", type=typing.get_args(kind)[0])
        else:
            options["type"] = kind
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                            help=(field.metadata["help"] + shown).replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
    return cls(**given), set(given)


def preset(config: Config, values: dict[str, Any], given: set[str]) -> Config:
    """`config` with `values` in the fields that were not given on the command line."""
    return dataclasses.replace(config, **{  # type: ignore[type-var]
        name: value for name, value in values.items() if name not in given})


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a mistake of the user ends in one line on stderr, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # A console of another encoding shows ? for a letter that it lacks, and the work goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        _fail(str(error), error.status)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `python generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; free some space or name another place, then try again", 2)


def print_json(entry: dict) -> None:
    """One JSON object as a line of UTF-8 on stdout, whatever the locale says: a data channel, whose
    reader gets every line at once."""
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    if sys.stdout is None:  # started with stdout closed: there is nobody to read it
        return
    buffer = getattr(sys.stdout, "buffer", None)
    sys.stdout.flush()  # what was printed before stands before
    if buffer is None:  # a stand-in without bytes behind it, as in a notebook
        sys.stdout.write(line)
    else:
        buffer.write(line.encode("utf-8"))
    sys.stdout.flush()


def _fail(message: str, status: int) -> typing.NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Writes `path` whole or not at all: a temporary file, fsynced, then renamed over it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        # The same bytes on every system: no "\r\n", which would change a checksum.
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(folder: str | Path, flag_name: str) -> None:
    """Makes sure, before any work, that files can be written into the folder or that it can be
    created; creates nothing itself."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        probe = existing / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder "
                        f"with {flag_name}") from error


def require(condition: object, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
