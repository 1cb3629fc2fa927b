"""What every command line here shares: flags made from a dataclass, one-line errors, safe writes.

    errors.py    errors that a user can mend, told from bugs
    flags.py     a dataclass as the flags of a command; presets, subcommands
    streams.py   the standard streams: closed ones, those whose reader goes, UTF-8
    commands.py  a command from its start to its end; signals
    files.py     files that are whole or not there, and the places for them
    locks.py     locks on folders and files, against a second process
    folders.py   folders that are whole or not there (imported by its own name: `cli.folders`)

For every other folder and every script. Nothing here knows about models or data, and it needs only
the standard library, so that the Jetson can use it too. Scripts import it first (see .ruff.toml):
reading it settles standard streams that are closed, makes an interruption one line also while the
large packages are read, and leaves NumPy's products one thread.
"""

from cli.commands import end_signals, run
from cli.errors import Stopped, UserError, describe, is_of_the_machine, require
from cli.files import atomic_file, check_file, check_links, check_writable, sha256_of, write_json
from cli.flags import choose, flag, parse, preset
from cli.locks import lock, lock_file
from cli.streams import print_json

import os
import platform

# NumPy's threads would wait, spinning, on the cores that torch's or ONNX Runtime's compute on: with
# two on two cores the small products of a draft head made verified drafts 3.3 times as slow. Its
# wheels bring OpenBLAS, which reads this once; not on ARM, where torch itself multiplies with it.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__all__ = [
    "Stopped", "UserError", "atomic_file", "check_file", "check_links", "check_writable", "choose",
    "describe",
    "end_signals", "flag", "is_of_the_machine", "lock", "lock_file", "parse", "preset",
    "print_json", "require", "run", "sha256_of", "write_json"]
