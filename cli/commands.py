"""A command from its start to its end: signals, streams, and errors as one line. A library, for
every script.
"""

from cli.errors import Stopped, UserError, describe, is_of_the_machine, require
from cli.streams import Steady, drop_stdout, settle, stand_in_for_closed_streams

import io
import signal
import sys
import threading
import typing
from collections.abc import Callable
from typing import Any


def run(main: Callable[[], None], prints: bool = False) -> None:
    """Runs a script's `main`; a mistake of the user ends in one line on stderr, not a traceback.

    There are two kinds of commands. Work that leaves files behind goes on without a stdout. What a
    command `prints` is its result: it ends quietly when the reader goes, and does not begin without
    a stdout. Both go on without a stderr. Ctrl-C, SIGTERM and SIGHUP end either in one line with
    status 128 + the signal's number, what was being written removed.
    """
    nobody = stand_in_for_closed_streams()
    settle("stdout", io.FileIO if prints else Steady)
    settle("stderr", Steady)
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
            raise KeyboardInterrupt from error
        if told:  # A library took what was raised for an error of its own, and went on.
            raise KeyboardInterrupt
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        _fail(str(error), error.status)
    except KeyboardInterrupt:
        number = told[0] if told else signal.SIGINT
        if number != signal.SIGINT:
            _fail(f"stopped by {signal.Signals(number).name}", 128 + number)
        _fail("interrupted", 130)
    except BrokenPipeError:
        if not prints:  # then it was no standard stream, but a pipe to another program
            raise
        drop_stdout()  # `python generate.py | head`
    except OSError as error:
        if not is_of_the_machine(error):
            raise
        drop_stdout()
        _fail(f"{describe(error)}; free some space or name another place, then try again", 2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _handle_ends(told: list[int]) -> dict[int, Any]:
    """Turns SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that all clean up alike, and puts
    their numbers into `told`; returns the handlers before. One that is ignored (as under nohup)
    stays so."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def end(number: int, frame: object) -> typing.NoReturn:
        told.append(number)
        raise KeyboardInterrupt

    numbers = [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    return {number: signal.signal(number, end) for number in (*numbers, *end_signals())}


def end_signals() -> list[int]:
    """Those that ask a program to end, but for Ctrl-C's, and are not ignored here."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _fail(message: str, status: int) -> typing.NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _interrupted_early(kind: type, error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted_early  # while the large packages are read, before `run`
