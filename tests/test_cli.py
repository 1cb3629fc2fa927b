import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

import cli
from cli import Stopped, UserError, atomic_file, check_writable, flag, parse


@dataclass
class Config:
    name: str = flag("a", "a name")
    count: int | None = flag(None, "100 % optional")
    rate: float = flag(0.5, "a rate")
    on: bool = flag(True, "a switch")
    many: list[str] = flag(["x"], "several")
    choice: str = flag("left", "one of", ("left", "right"))


def test_every_field_is_a_flag_and_explicit_ones_are_known():
    config, given = parse(Config, "doc", ["--count", "3", "--no-on", "--many", "p", "q"])
    assert config == Config(count=3, on=False, many=["p", "q"])
    assert given == {"count", "on", "many"}
    assert parse(Config, "doc", []) == (Config(), set())


def test_help_gives_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, "what it does", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "what it does" in text and "(default: 0.5)" in text and "100 % optional" in text


@pytest.mark.parametrize("argv", [["--count", "x"], ["--choice", "up"], ["--unknown", "1"],
                                  ["--nam", "abbreviated"]])
def test_a_wrong_flag_is_one_line(argv, fails):
    fails(lambda argv: parse(Config, "doc", argv), *argv)


def outcome(capsys, error: BaseException) -> tuple[int, str]:
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code, capsys.readouterr().err


def test_mistakes_of_the_user_are_one_line(capsys):
    assert outcome(capsys, UserError("no\n data")) == (2, "error: no data\n")
    assert outcome(capsys, Stopped("diverged")) == (1, "error: diverged\n")
    assert outcome(capsys, KeyboardInterrupt()) == (130, "error: interrupted\n")
    status, text = outcome(capsys, OSError(errno.ENOSPC, "No space left on device", "x.bin"))
    assert status == 2 and text.startswith("error: x.bin: No space left on device")


def test_a_bug_keeps_its_traceback():
    def main():
        raise FileNotFoundError(errno.ENOENT, "a file that the program lost")
    with pytest.raises(FileNotFoundError):
        cli.run(main)


def test_a_closed_pipe_is_no_error(monkeypatch):
    duplicated = []
    monkeypatch.setattr(os, "dup2", lambda *args: duplicated.append(args))

    def main():
        raise BrokenPipeError
    cli.run(main)
    assert len(duplicated) == 1


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    with atomic_file(path, "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_file(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_text_files_have_the_same_bytes_everywhere(tmp_path: Path):
    with atomic_file(tmp_path / "file", "w") as file:
        file.write("é\n")
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n"


def test_an_unwritable_folder_names_the_flag(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        check_writable(tmp_path / "file" / "below", "--out")
    check_writable(tmp_path / "a" / "b", "--out")
    assert os.listdir(tmp_path) == ["file"]


def test_a_console_of_another_encoding_does_not_stop_the_work():
    code = "import cli; cli.run(lambda: print('café ± 日'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.strip() == b"caf? ? ?"
