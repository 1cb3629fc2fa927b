"""The command line: flags made from a dataclass, presets, subcommands. A library, for every script.

    @dataclass
    class Config:
        steps: int = flag(64, "steps of sampling")

    config, given = parse(Config, __doc__)
"""

from cli.errors import require

import argparse
import dataclasses
import importlib
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

Config = TypeVar("Config")
# What the flags being read belong to, in messages; None: the script
_program: ContextVar[str | None] = ContextVar("program", default=None)


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
                     allow_abbrev=False, prog=_program.get())
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
        if not argv:
            parser.error(f"say which: {', '.join(commands)}")
        name, argv = parser.parse_args(argv[:1]).command, argv[1:]
    else:
        name = default
    require(importlib.util.find_spec(commands[name]), f"{name} is not in this folder, which has "
            "only what runs on a device: run it in the repository")
    before = _program.set(f"{os.path.basename(sys.argv[0])} {name}")
    try:
        importlib.import_module(commands[name]).main(argv)
    finally:
        _program.reset(before)
