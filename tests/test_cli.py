import cli
from cli import Stopped, UserError, atomic_file, check_writable, flag, parse

import errno
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, python


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
    cli.run(main, prints=True)
    assert len(duplicated) == 1


def test_a_broken_pipe_to_another_program_is_not_taken_for_the_readers():
    def main():
        raise BrokenPipeError
    with pytest.raises(BrokenPipeError):
        cli.run(main)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    with atomic_file(path, "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_file(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_strangers_partial_file_is_left_alone(tmp_path: Path):
    (tmp_path / "file.partial").write_text("not ours")
    with atomic_file(tmp_path / "file", "w") as file:
        file.write("ours")
    assert (tmp_path / "file.partial").read_text() == "not ours"
    # and an error of what is read meanwhile names that
    with pytest.raises(FileNotFoundError) as error, atomic_file(tmp_path / "file"):
        open(tmp_path / "input")
    assert error.value.filename == str(tmp_path / "input")


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


# ---- streams, signals and disks, in processes of their own ---------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX shells and signals")
COUNTS = ("import sys, time, cli\ndef main():\n    for i in range(5000):\n"
          "        print('line é', i, flush=True)\n"
          "    with cli.atomic_file(sys.argv[1], 'w') as file:\n        file.write('whole')\n"
          "    print('told', file=sys.stderr)\n")


def shell(code: str, output: Path, redirect: str, **env: str) -> subprocess.CompletedProcess:
    command = f"{shlex.join(python('-c', code, output))} {redirect}"
    return subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, timeout=60,
                          env={**os.environ, **env})


@posix
@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | head -1",
                                      "> /dev/full", "> /dev/full 2>&1"])
def test_work_goes_on_without_its_streams(tmp_path, redirect):
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    output = tmp_path / "file"
    done = shell(COUNTS + "cli.run(main)", output, redirect)
    assert done.returncode == 0 and output.read_text() == "whole"
    assert os.listdir(tmp_path) == ["file"]
    assert b"Error" not in done.stderr and b"error" not in done.stderr


@posix
def test_what_is_printed_ends_with_its_reader_and_needs_one(tmp_path):
    code = COUNTS + "cli.run(main, prints=True)"
    done = shell(code, tmp_path / "file", "| head -1")
    assert done.stdout == "line é 0\n".encode() and not done.stderr
    assert not (tmp_path / "file").exists()
    done = shell(code, tmp_path / "file", ">&-")
    assert done.returncode == 2 and done.stderr.startswith(b"error: stdout is closed")
    assert shell(code, tmp_path / "file", "2>&-").returncode == 0
    if Path("/dev/full").exists():  # nobody has the result: that is an error
        done = shell(code, tmp_path / "file", "> /dev/full")
        assert done.returncode == 2 and b"No space left" in done.stderr


@posix
def test_a_signal_that_a_library_swallowed_ends_the_command_all_the_same(tmp_path):
    code = ("import os, signal, cli\ndef main():\n    try:\n        os.kill(os.getpid(), "
            "signal.SIGTERM)\n    except BaseException:\n        pass\n"
            "cli.run(main)")
    done = shell(code, tmp_path / "file", "")
    assert done.returncode == 143 and done.stderr == b"error: stopped by SIGTERM\n"


@posix
def test_a_closed_stream_is_never_a_file_of_ours(tmp_path):
    """Else the first file opened has the number of stderr, and C code prints into it."""
    code = ("import os, sys, cli\ndef main():\n    with cli.atomic_file(sys.argv[1]) as file:\n"
            "        os.write(2, b'noise of a library')\n        os.write(1, b'noise')\n"
            "        file.write(b'whole')\ncli.run(main)")
    assert shell(code, tmp_path / "file", "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_bytes() == b"whole"


@posix
def test_files_and_pipes_get_utf8_whatever_the_locale(tmp_path):
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    code = ("import cli\ncli.run(lambda: (print('caf\\xe9 \\u65e5'), "
            "cli.print_json({'a': '\\xe9\\u65e5'})))")
    for redirect in ("", f"> {tmp_path / 'out'}"):
        done = shell(code, tmp_path, redirect, **plain)
        text = done.stdout if not redirect else (tmp_path / "out").read_bytes()
        assert done.returncode == 0 and text.decode() == 'café 日\n{"a": "é日"}\n'
    # whoever asks for another encoding of the text has it; JSON is UTF-8 by its definition
    done = shell(code, tmp_path, "", PYTHONIOENCODING="latin-1")
    assert done.stdout == "café ?\n".encode("latin-1") + '{"a": "é日"}\n'.encode()


@posix
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_nothing_half_written(tmp_path, name, status):
    code = ("import sys, time, cli\ndef main():\n    with cli.atomic_file(sys.argv[1]) as file:\n"
            "        file.write(b'half')\n        print('now', flush=True)\n"
            "        time.sleep(60)\n"
            "cli.run(main)")
    process = subprocess.Popen(python("-c", code, tmp_path / "file"), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(getattr(signal, name))
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == status and os.listdir(tmp_path) == []
    assert error == ("error: interrupted\n" if name == "SIGINT" else f"error: stopped by {name}\n")


@posix
def test_nohup_is_respected():
    code = ("import os, signal, cli\n"
            "cli.run(lambda: (os.kill(os.getpid(), signal.SIGHUP), print('went on')))")
    done = subprocess.run(["sh", "-c", f"trap '' HUP; exec {shlex.join(python('-c', code))}"],
                          cwd=ROOT, capture_output=True, timeout=30)
    assert done.stdout == b"went on\n"


def test_an_interruption_while_packages_are_read_is_one_line():
    done = subprocess.run(python("-c", "import cli; raise KeyboardInterrupt"), cwd=ROOT,
                          capture_output=True, timeout=30)
    assert done.returncode and done.stderr == b"error: interrupted\n"


@posix
@pytest.mark.parametrize("write", ["torch.save({'w': torch.zeros(300_000)}, file)",
                                   "file.write(b'x' * 1_200_000)", "file.write(b'x' * 101_000)"])
def test_a_limit_is_named_and_nothing_is_left(tmp_path, write):
    (tmp_path / "file").write_text("old")
    code = ("import resource, sys, torch, cli\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, "
            "100_000))\ndef main():\n    with cli.atomic_file(sys.argv[1]) as file:\n"
            f"        {write}\ncli.run(main)")
    done = shell(code, tmp_path / "file", "")
    assert done.returncode == 2, done.stderr
    assert done.stderr.decode().startswith(f"error: {tmp_path / 'file'}: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(UserError, match="does not exist.*--out"):
            check_writable(folder, "--out")


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = ("import sys, time, cli\nwith cli.lock(sys.argv[1], '--out'):\n"
            "    print('held', flush=True)\n    time.sleep(60)")
    holder = subprocess.Popen(python("-c", code, tmp_path), cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match=f"process {holder.pid} .*--out"), cli.lock(tmp_path,
                                                                                  "--out"):
        pass
    holder.kill()
    holder.wait()
    with cli.lock(tmp_path, "--out"):
        pass


def test_an_interruption_that_a_library_makes_another_error_of_stays_one():
    code = ("import cli, os, signal\n"
            "def main():\n"
            "    try:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    except BaseException as error:\n"
            "        raise RuntimeError('half imported') from error\n"
            "cli.run(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGTERM\n")


def test_a_subcommands_flags_are_those_of_the_subcommand(monkeypatch, fails):
    monkeypatch.setattr("sys.argv", ["/somewhere/evaluate.py"])
    import evaluate
    assert "(see evaluate.py samplers --help)" in fails(evaluate.main, "samplers", "--foo")
    assert "(see evaluate.py --help)" in fails(evaluate.main, "nothing")
    assert "(see evaluate.py likelihood --help)" in fails(evaluate.main, "--foo")
