"""The standard streams: closed ones, those whose reader goes, and UTF-8. A library of commands.py.

Reading this file opens the null device for every standard stream that is closed.
"""

import io
import json
import os
import sys
from contextlib import suppress
from typing import Any


class Steady(io.FileIO):
    """A standard stream whose reader may go (a closed pipe or terminal, a log on a full disk): what
    is written then is dropped."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def stand_in_for_closed_streams() -> bool:
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


def settle(name: str, kind: type[io.FileIO]) -> None:
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


def drop_stdout() -> None:
    """What still waits to be printed cannot be: the interpreter must not try it at its end."""
    with suppress(OSError):  # a stand-in without a file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


# Before anything else is imported, so that no library keeps a file open under a stream's number.
_nobody = open(os.devnull, "w")
stand_in_for_closed_streams()
