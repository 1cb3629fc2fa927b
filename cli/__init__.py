"""What every command line here shares: flags made from a dataclass, one-line errors, safe writes.

Nothing in this file knows about models or data, and it needs only the standard library, so that
the device scripts can use it too. Scripts import it first (see pyproject.toml): an interruption
while the large packages are read is one line as well.
"""

import argparse
import dataclasses
import errno
import hashlib
import importlib
import io
import json
import os
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

Config = TypeVar("Config")

# Errors of the machine that a user can mend, as against a bug of ours, which keeps its traceback.
_USER_ERRNOS = {getattr(errno, name) for name in (
    "EACCES EPERM EROFS ENOSPC EDQUOT EISDIR ENOTDIR ENAMETOOLONG EFBIG EIO EBUSY ELOOP ENXIO "
    "ENODEV ESTALE ENOTCONN ETIMEDOUT").split() if hasattr(errno, name)}


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


def choose(doc: str | None, commands: dict[str, str], argv: Sequence[str] | None = None,
           default: str | None = None) -> None:
    """Calls `main(flags)` of the module that `commands` has for the first word, and reads no other
    one; without such a word that of `default`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if default is None or argv and not argv[0].startswith("-") or argv[:1] in (["-h"], ["--help"]):
        parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         usage=f"%(prog)s {{{','.join(commands)}}} [flags]", allow_abbrev=False)
        parser.add_argument("command", choices=list(commands), metavar="command")
        name, argv = parser.parse_args(argv[:1]).command, argv[1:]
    else:
        name = default
    importlib.import_module(commands[name]).main(argv)


# ---- a command from its start to its end ---------------------------------------------------------

class _Ended(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP: all clean up alike."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class _Steady(io.FileIO):
    """A standard stream whose reader may go (a closed pipe or terminal, a log on a full disk): what
    is written then is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run(main: Callable[[], None], prints: bool = False) -> None:
    """Runs a script's `main`; a mistake of the user ends in one line on stderr, not a traceback.

    There are two kinds of commands. Work that leaves files behind goes on without a stdout. What a
    command `prints` is its result: it ends quietly when the reader goes, and does not begin without
    a stdout. Both go on without a stderr. Ctrl-C, SIGTERM and SIGHUP end either in one line with
    status 128 + the signal's number, what was being written removed.
    """
    nobody = _stand_in_for_closed_streams()
    _settle("stdout", io.FileIO if prints else _Steady)
    _settle("stderr", _Steady)
    told: list[int] = []
    handlers = _handle_ends(told)
    try:
        require(not (prints and nobody), "stdout is closed, and what this command makes is written "
                                         "there: give it a file or a pipe")
        try:
            main()
        except Exception as error:
            if not told or isinstance(error, Stopped):
                raise
            # A library that was interrupted may fail with an error of its own.
            raise _Ended(told[0]) from error
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        _fail(str(error), error.status)
    except KeyboardInterrupt as end:
        number = getattr(end, "number", signal.SIGINT)
        if number != signal.SIGINT:
            _fail(f"stopped by {signal.Signals(number).name}", 128 + number)
        _fail("interrupted", 130)
    except BrokenPipeError:
        if not prints:  # then it was no standard stream, but a pipe to another program
            raise
        _drop_stdout()  # `python generate.py | head`
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        _drop_stdout()
        _fail(f"{describe(error)}; free some space or name another place, then try again", 2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _drop_stdout() -> None:
    """What still waits to be printed cannot be: the interpreter must not try it at its end."""
    with suppress(OSError):  # a stand-in without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: OSError) -> str:
    """File and cause of an error of the file system."""
    return (f"{error.filename}: " if error.filename else "") + str(error.strerror or error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the user can mend it: a full disk, missing rights, a broken device."""
    return isinstance(error, OSError) and error.errno in _USER_ERRNOS


def _stand_in_for_closed_streams() -> bool:
    """Opens the null device for each standard stream that the process was started without; returns
    whether stdout is one of them.

    Else the next file opened would get its number, and what a C library prints would land in a
    checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    missing = sys.stdout is None or sys.stdout is _nobody
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, _nobody if name == "stdout" else open(os.devnull, mode))
    return missing


def _settle(name: str, kind: type[io.FileIO]) -> None:
    """Makes a standard stream of this kind. A file or pipe gets UTF-8, unless PYTHONIOENCODING asks
    for something else; a console shows ? for a letter that it lacks, and the work goes on."""
    old = getattr(sys, name)
    if old is not getattr(sys, f"__{name}__") or not isinstance(old, io.TextIOWrapper):
        return  # a notebook's or a test's
    old.flush()
    if sys.platform == "win32" and old.isatty():  # its console takes no bytes
        old.reconfigure(errors="replace")
        return
    own = old.isatty() or "PYTHONIOENCODING" in os.environ
    raw = kind(old.fileno(), "w", closefd=False)
    setattr(sys, name, io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=old.encoding if own else "utf-8", errors="replace",
        line_buffering=old.line_buffering, write_through=old.write_through))


def _handle_ends(told: list[int]) -> dict[int, Any]:
    """Turns SIGINT, SIGTERM and SIGHUP into `_Ended`, and puts their numbers into `told`; returns
    the handlers before. One that is ignored (as under nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def end(number: int, frame: object) -> typing.NoReturn:
        told.append(number)
        raise _Ended(number)

    numbers = [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    return {number: signal.signal(number, end) for number in (*numbers, *end_signals())}


def end_signals() -> list[int]:
    """Those that ask a program to end, but for Ctrl-C's, and are not ignored here."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _interrupted_early(kind: type, error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Before anything else is imported, so that no library keeps a file open under a stream's number.
_nobody = open(os.devnull, "w")
_stand_in_for_closed_streams()
sys.excepthook = _interrupted_early


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


# ---- files ---------------------------------------------------------------------------------------

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


def check_links(path: str | Path, flag_name: str) -> None:
    """Refuses a path that leads over a link to nowhere: what is there may be gone for a while (a
    volume that is not mounted), and must not be made in its place."""
    path = Path(path).absolute()
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise UserError(f"{part} is a link to {os.readlink(part)}, which does not exist: mend "
                            f"it, or choose another place with {flag_name}")


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


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces (hashlib.file_digest is not in Python 3.10)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def require(condition: object, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
