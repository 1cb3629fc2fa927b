"""Every command in hostile surroundings, as real processes: a table of commands x situations.

In each cell the exit status is as documented, at most one line `error: ...` stands on stderr, there
is no traceback and nothing half-written, and what was asked for is there or said not to be.

Commands that leave files behind go on without a reader to their end; those that print a result end
quietly when the reader goes. Ctrl-C, SIGTERM and SIGHUP end with status 128 + the signal's number.
A script that is not in the table, or a situation without a command, fails a test below.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

import benchmark
import evaluate
import train
from corpus.files import SEPARATOR
from kinds.checkpoints import load_checkpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"),
                                reason="needs /proc, signals and limits as Linux has them")
SECONDS = 240  # that a process may take on a busy machine
TORCH, NUMPY = 1.5, 0.4  # CPU-seconds until a script has read its libraries, roughly
TOOLS = ("--precision", "fp32", "--device", "cpu")
TRAINING = ("--model_config", "micro", "--batch_tokens", "512", "--valid_every", "3",
            "--valid_rows", "4", "--num_samples", "1", "--sample_steps", "2", *TOOLS)
OUTPUTS = ("last.pt", "best.pt", "final.pt", "metrics.jsonl", "training_curves.png")


@dataclass(frozen=True)
class Command:
    """One command line. In its words {out} is a folder of the cell, and {data}, {model},
    {conditional}, {bundle}, {text}, {file} and {folder} are there already."""

    script: str  # or -m and a module
    args: str  # how it is called; a short run
    long: str = ""  # what is added so that a signal finds it at work
    files: tuple[str, ...] = ()  # what it leaves in {out}; nothing: it prints its result
    folder: str = ""  # added: a folder where a file belongs
    file: str = ""  # added: a file where a folder belongs
    starts: float = TORCH
    room: int = 0  # bytes of a disk on which it is in the middle of its work when they are used up
    made: bool = False  # {out} must be there before
    whole: bool = False  # {out} appears whole or not at all
    training: bool = False


BENCHMARK = ("--model_config micro --batch 2 --seq_len 32 --repeats 1 --no-memory --vocab_size 300 "
             "--precision fp32 --device cpu")
EVALUATION = "--output {out}/e.json --num_samples 2 --precision fp32 --device cpu"
COMMANDS = {
    "train.py": Command(
        "train.py", f"--data_dir {{data}} --checkpoint_dir {{out}} --max_steps 3 --save_every 1 "
        f"{' '.join(TRAINING)}", "--max_steps 1000000", OUTPUTS,
        folder="--data_dir {out}/data --data_source {folder}", file="--checkpoint_dir {file}",
        room=16 * 2**20, training=True),
    "train_long.py": Command(
        "train_long.py", f"--data_dir {{data}} --checkpoint_dir {{out}} --max_steps 3 --draws 1 "
        f"--save_every 1 --evaluate_rows 4 --compared_stories 2 --written_stories 2 "
        f"--written_steps 2 {' '.join(TRAINING)}", "--max_steps 1000000",
        (*OUTPUTS, "evaluation.json", "samples.md", "report.md", "settings.json"),
        folder="--data_dir {out}/data --data_source {folder}", file="--checkpoint_dir {file}",
        room=16 * 2**20, training=True),
    "data_prep.py": Command(
        "data_prep.py", "--source {text} --data_dir {out} --vocab_size 300 --seq_len 64 "
        "--valid_fraction 0.2", "--source sample --max_stories 100000",
        ("meta.json", "tokenizer.json", "train_00000.bin"), "--source {folder}",
        "--data_dir {file}", NUMPY, room=2**13, whole=True),
    "prep_conditional_data.py": Command(
        "prep_conditional_data.py", "--data_dir {data} --output_dir {out}",
        "--source sample --max_stories 100000",
        ("meta.json", "tokenizer.json", "train_condition_00000.bin"), "--pairs {folder}",
        "--output_dir {file}", NUMPY, room=2**13, whole=True),
    "prep_image_data.py": Command(
        "prep_image_data.py", "--pairs {pairs} --data_dir {data} --output_dir {out} --image_size 8",
        "--pairs {many_pairs}", ("meta.json", "tokenizer.json", "train_condition_00000.bin"),
        "--pairs {folder}", "--output_dir {file}", NUMPY, room=2**13, whole=True),
    "export_jetson.py": Command(
        "export_jetson.py", "--checkpoint {model} --data_dir {data} --out_dir {out} --precisions "
        "fp32 --report_rows 0", "--precisions fp32 int8 --report_rows 100000",
        ("bundle.json", "step_fp32.onnx", "README.md"), "--checkpoint {folder}", "--out_dir {file}",
        2.0, room=2**16, whole=True),
    "evaluate.py likelihood": Command(
        "evaluate.py", f"likelihood --checkpoint {{model}} --data_dir {{data}} {EVALUATION} "
        "--steps 2 --draws 1 --max_rows 4", "--draws 1000000", ("e.json",), "--output {folder}",
        "--data_dir {file}", made=True),
    "evaluate.py samplers": Command(
        "evaluate.py", f"samplers --checkpoint {{model}} --data_dir {{data}} {EVALUATION} "
        "--evaluations 2 --samplers random", "--evaluations 100000", ("e.json", "e_pareto.png"),
        made=True),
    "evaluate.py infilling": Command(
        "evaluate.py", f"infilling --checkpoint {{model}} --data_dir {{data}} {EVALUATION} "
        "--steps 2 --draws 1", "--draws 1000000", ("e.json",), made=True),
    "evaluate.py blocks": Command(
        "evaluate.py", f"blocks --checkpoint {{joint}} --data_dir {{data}} {EVALUATION} --max_rows "
        "4 --repeats 1 --ways row/1", "--draws 1000000", ("e.json", "block_tradeoff.png"),
        made=True),
    "evaluate.py condition": Command(
        "evaluate.py", f"condition --checkpoint {{conditional}} {EVALUATION} --steps 2 --draws 1 "
        "--max_rows 4 --guidances 1", "--draws 1000000", ("e.json", "e.md"), made=True),
    "evaluate.py pictures": Command(
        "evaluate.py", "pictures --checkpoint {pictures} --output {out}/e.json --num_samples 2 "
        "--max_rows 8 --mode row --draws 1 --device cpu --precision fp32", "--draws 1000000",
        ("e.json", "e.html", "e.png"), made=True),
    "evaluate.py curves": Command(
        "evaluate.py", "curves --compare {run} --output {out}/c.png", "", ("c.png",),
        "--output {folder}", "--compare {file}", NUMPY),
    "benchmark.py train": Command(
        "benchmark.py", f"train {BENCHMARK} --arms eager --json {{out}}/b.json",
        "--repeats 1000000", ("b.json",), "--json {folder}", "--json {file}/b.json"),
    "benchmark.py sample": Command(
        "benchmark.py", f"sample {BENCHMARK} --steps 2 --arms own --json {{out}}/b.json",
        "--repeats 1000000", ("b.json",), "--json {folder}", "--json {file}/b.json"),
    "benchmark.py write": Command(
        "benchmark.py", f"write {BENCHMARK} --arms causal --json {{out}}/b.json",
        "--repeats 1000000", ("b.json",), "--json {folder}", "--json {file}/b.json"),
    "benchmark.py device": Command(
        "benchmark.py", "device --bundle {bundle} --nfe 2 --repeats 1 --output {out}/d.json",
        "--repeats 1000000", ("d.json", "d.png"), "--output {folder}", "--bundle {file}", NUMPY,
        made=True),
    "benchmark.py roofline": Command("benchmark.py", "roofline", folder="--measured {folder}"),
    "generate.py": Command(
        "generate.py", "--checkpoint {model} --num_samples 2 --steps 2 --length 8 --device cpu",
        "--num_samples 1000000", folder="--checkpoint {folder}",
        file="--conditions {file}/conditions.txt"),
    "generate.py --onnx --json": Command(
        "generate.py", "--onnx {bundle}/step_fp32.onnx --num_samples 60 --batch_size 2 --steps 2 "
        "--length 60 --json", "--num_samples 1000000", folder="--onnx {folder}",
        file="--onnx {file}/step_fp32.onnx", starts=NUMPY),
    "generate.py --onnx --trace": Command(
        "generate.py", "--onnx {bundle}/step_fp32.onnx --num_samples 2 --steps 2 --length 8 "
        "--trace {out}/t.html", "--num_samples 1000000", ("t.html",), "--trace {folder}.html",
        "--trace {file}/t.html", NUMPY),
    "training.slim": Command(
        "-m training.slim", "--checkpoint {model} --output {out}/s.pt", "", ("s.pt",),
        "--output {folder}", "--output {file}/s.pt", made=True),
    "training.naming": Command(
        "-m training.naming", "--emoji {styles}/one {styles}/two --held_out two --image_size 16 "
        "--batch 8 --max_steps 3 --valid_every 1 --device cpu --output {out}/n.pt",
        "--max_steps 1000000 --valid_every 1000000", ("n.pt",), "--output {folder}",
        "--output {file}/n.pt", made=True),
    "corpus.sample_stories": Command("-m corpus.sample_stories", "--count 2000", "--count 100000",
                                     starts=0.1),
}

SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
SITUATIONS = (
    "closed stdout", "closed stderr", "closed stdin and not UTF-8", "| head -1", "full stdout",
    "read-only place", "full disk", "largest file", "a folder as file", "a file as folder",
    "dangling link", *SIGNALS, "Ctrl-C at the start", "SIGHUP under nohup")

SHORT = "it is over in a tenth of a second"
PRINTS = "it writes no file"
NOT_APPLICABLE: dict[tuple[str, str], str] = {
    **{(name, "full stdout"): "as for a reader that goes: what it prints is not its result"
       for name, command in COMMANDS.items() if command.files and name != "data_prep.py"
       and command.script != "generate.py"},
    **{(name, situation): PRINTS for name, command in COMMANDS.items() if not command.files
       for situation in ("read-only place", "full disk", "largest file", "dangling link")},
    **{(name, situation): SHORT for name, command in COMMANDS.items() if not command.long
       for situation in (*SIGNALS, "SIGHUP under nohup")},
    **{(name, situation): "the same code as evaluate.py likelihood, whose row has it"
       for name in ("evaluate.py samplers", "evaluate.py infilling", "evaluate.py condition",
                    "evaluate.py pictures")
       for situation in SITUATIONS if situation not in ("closed stdout", "full disk", "SIGTERM")},
    **{(name, situation): "the same code as another of its script, whose row has it"
       for name in ("evaluate.py blocks", "benchmark.py write")
       for situation in SITUATIONS if situation != "full disk"},
    **{("training.slim", situation): "it is over in a second, and prints a line"
       for situation in SITUATIONS if situation not in ("full disk", "read-only place",
                                                        "a folder as file", "a file as folder")},
    **{("training.naming", situation): "the streams and signals of all, which other rows have"
       for situation in SITUATIONS if situation not in ("closed stdout", "full disk", "SIGTERM",
                                                        "a folder as file", "a file as folder",
                                                        "dangling link", "read-only place")},
    **{(name, "SIGHUP under nohup"): "cli sets the handlers of all; one of each kind is enough"
       for name in COMMANDS if name not in ("train.py", "data_prep.py", "corpus.sample_stories")},
    **{("corpus.sample_stories", situation): "it reads no file"
       for situation in ("a folder as file", "a file as folder")},
    ("benchmark.py roofline", "a file as folder"): "it reads no folder",
    **{(name, "Ctrl-C at the start"): "its libraries are read in a tenth of a second"
       for name, command in COMMANDS.items() if command.starts < 0.3},
}
CELLS = [(name, situation) for name in COMMANDS for situation in SITUATIONS
         if (name, situation) not in NOT_APPLICABLE]


# ---- processes -----------------------------------------------------------------------------------

# Sets what the process begins with, and becomes it.
LAUNCH = """
import json, os, resource, signal, sys
told = json.loads(sys.argv[1])
for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_IGN if name in told["ignored"] else
                  signal.SIG_DFL)
if told["largest"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (told["largest"], told["largest"]))
for number in told["closed"]:
    os.close(number)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class Ended:
    """How a process ended."""

    status: int  # as a shell shows it: 128 + the signal's number for one that a signal killed
    killed: bool  # by a signal, before the program could know of it
    stdout: bytes
    stderr: str
    out: Path
    signalled: float | None = None  # CPU-seconds at which it was told to end


def cpu_seconds(pid: int) -> float:
    """What a process has used until now; infinite if it has ended."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    if numbers[0] == "Z":
        return float("inf")
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


class Table:
    """Runs cells."""

    def __init__(self, base: Path, places: dict[str, object]):
        self.base, self.places = base, places
        self.mounts: list[Path] = []
        self.read_only = self.make_read_only()

    def mount(self, path: Path, size: int) -> bool:
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
                              capture_output=True) if shutil.which("mount") else None
        if not done or done.returncode:
            return False
        self.mounts.append(path)
        return True

    def make_read_only(self) -> Path | None:
        """A folder in which nothing can be written, not even by root."""
        path = self.base / "read_only"
        if self.mount(path, 2**16):
            (path / "out").mkdir()
            subprocess.run(["mount", "-o", "remount,ro", str(path)], capture_output=True)
        else:
            (path / "out").mkdir(exist_ok=True)
            (path / "out").chmod(0o555)
        try:
            (path / "out" / "probe").touch()
        except OSError:
            return path / "out"
        return None

    def close(self) -> None:
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], capture_output=True)

    def run(self, name: str, situation: str) -> Ended:
        command = COMMANDS[name]
        folder = self.base / re.sub(r"\W+", "_", f"{name} {situation}")
        folder.mkdir()
        out = folder / "out"
        told = {"ignored": [], "closed": [], "largest": 0}
        added = ""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if situation in SIGNALS or situation == "Ctrl-C at the start":
            added = command.long
        elif situation == "SIGHUP under nohup":
            told["ignored"] = ["SIGHUP"]
        elif situation.startswith("closed"):
            told["closed"] = [("stdin", "stdout", "stderr").index(situation.split()[1])]
        if situation.endswith("not UTF-8"):
            environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        elif situation == "read-only place":
            if self.read_only is None:
                pytest.skip("no folder that cannot be written could be made here")
            out = self.read_only if command.made else self.read_only / "new"
        elif situation == "full disk":
            size = command.room + 2**12
            if not self.mount(folder / "disk", size):
                pytest.skip("no disk of its own can be mounted here")
            (folder / "disk" / "filler").write_bytes(bytes(2**12))
            out = folder / "disk" / "out"
        elif situation == "largest file":
            told["largest"] = 400
        elif situation == "dangling link":
            out.symlink_to(folder / "nowhere")
        elif situation == "a folder as file":
            added = command.folder
        elif situation == "a file as folder":
            added = command.file
        if command.made and situation not in ("read-only place", "dangling link"):
            out.mkdir()
        words = f"{command.args} {added}".format(out=out, **self.places).split()
        script = (command.script.split() if command.script.startswith("-m") else
                  [str(ROOT / command.script)])
        return self.process(situation, command, [*script, *words], told, environment, folder, out)

    def process(self, situation: str, command: Command, words: list[str], told: dict,
                environment: dict, folder: Path, out: Path) -> Ended:
        line = [sys.executable, "-S", "-E", "-c", LAUNCH, json.dumps(told), *words]
        with (open(folder / "stderr", "w+b") as errors, open(folder / "stdout", "w+b") as printed,
              open("/dev/full", "wb") as full):
            target = (full if situation == "full stdout" else subprocess.PIPE
                      if situation in ("| head -1", "largest file") else printed)
            # a pipe has no largest size, which a file of the process has
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=target, env=environment, cwd=folder,
                stderr=subprocess.PIPE if situation == "largest file" else errors)
            try:
                signalled, stdout, stderr = None, b"", b""
                if situation == "| head -1":
                    stdout = process.stdout.readline()
                    process.stdout.close()
                elif situation in SIGNALS or situation.startswith(("Ctrl-C", "SIGHUP")):
                    signalled = self.signal(situation, command, process, out)
                if situation == "largest file":
                    stdout, stderr = process.communicate(timeout=SECONDS)
                process.wait(SECONDS)
            finally:
                process.kill()
                process.wait()
            errors.seek(0)
            printed.seek(0)
            status = process.returncode
            return Ended(128 - status if status < 0 else status, status < 0,
                         stdout or printed.read(), (stderr or errors.read()).decode(), out,
                         signalled)

    def signal(self, situation: str, command: Command, process: subprocess.Popen, out: Path,
               ) -> float:
        """Sends the signal at a random moment of the work, the same in every run by the CPU's
        clock."""
        chance = random.Random(f"{command.args} {situation}").random()
        ends = time.monotonic() + SECONDS / 2
        while LAUNCH.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert time.monotonic() < ends
            time.sleep(0.001)  # until it is the command, with its signals set
        if situation == "Ctrl-C at the start":  # while the libraries are read
            moment = 0.15 + chance * (command.starts - 0.15)
        elif situation == "SIGHUP under nohup":  # which is to change nothing
            moment = chance * command.starts
        else:
            moment = command.starts * (1 + chance)
            if command.training:
                while not (out / "last.pt").exists() and process.poll() is None:
                    assert time.monotonic() < ends
                    time.sleep(0.02)
                moment = cpu_seconds(process.pid) + chance
        while cpu_seconds(process.pid) < moment:
            assert time.monotonic() < ends
            time.sleep(0.01)
        process.send_signal(SIGNALS[situation.split()[0]])
        return moment


@pytest.fixture(scope="session")
def table(tmp_path_factory, long_data_dir, checkpoint, conditional_checkpoint, bundle,
          joint_checkpoint, picture_checkpoint, picture_dir) -> Iterator[Table]:
    base = tmp_path_factory.mktemp("hostile")
    (base / "text.txt").write_text(f"\n{SEPARATOR}\n".join(
        f"Story {i}: the café was so small that Tom {'ran ' * (i % 7)}home." for i in range(400)),
        encoding="utf-8")
    (base / "file").touch()
    for name in ("folder", "folder.html"):
        (base / name).mkdir()
    many = picture_dir.parent / "many.jsonl"
    many.write_text("".join(f'{{"image": "0.png", "text": "Number {i} is a cat."}}\n'
                            for i in range(100_000)))
    for style in ("one", "two"):
        folder = shutil.copytree(ROOT / "tests/data/emoji", base / "styles" / style)
        text = (folder / "pairs.jsonl").read_text()
        (folder / "pairs.jsonl").write_text(text.replace('"noto"', f'"{style}"'))
    table = Table(base, dict(
        styles=base / "styles",
        pictures=picture_checkpoint, pairs=many.with_name("pairs.jsonl"), many_pairs=many,
        data=long_data_dir, model=checkpoint, conditional=conditional_checkpoint,
        joint=joint_checkpoint, run=checkpoint.parent, bundle=bundle,
        text=base / "text.txt", file=base / "file", folder=base / "folder"))
    yield table
    table.close()


# ---- what must hold ------------------------------------------------------------------------------

def expected_status(name: str, situation: str) -> set[int]:
    command = COMMANDS[name]
    prints = command.script == "generate.py" or not command.files
    if situation in SIGNALS or situation == "Ctrl-C at the start":
        return {128 + SIGNALS[situation.split()[0]]}
    if situation in ("a folder as file", "a file as folder", "read-only place", "full disk",
                     "largest file", "dangling link"):
        return {2}
    if prints and situation in ("closed stdout", "full stdout"):
        return {2}
    return {0, 141} if prints and situation == "| head -1" else {0}


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_a_command_in_hostile_surroundings(cell, table):
    name, situation = cell
    command = COMMANDS[name]
    ended = table.run(*cell)
    shown = f"status {ended.status}, signalled at {ended.signalled}\n{ended.stderr}"
    # 1. The status, and one line that says why.
    assert ended.status in expected_status(name, situation), shown
    assert "Traceback" not in ended.stderr, shown
    lines = ended.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    silent = ended.status in (0, 141) or situation == "closed stderr"
    assert len(errors) == (not silent) or ended.killed and len(errors) < 2, shown
    if not command.training:
        assert lines == errors or ended.status == 0, shown
    # 2. Nothing half-written.
    out, there = ended.out, ended.status == 0
    assert not [path for path in (*out.parent.rglob("*.partial*"), *out.parent.rglob(".write_t*"),
                                  *out.parent.rglob(".lock"))], shown
    if command.whole:
        assert there or out.is_symlink() or not out.exists() or situation == "read-only place"
    if command.training and out.is_dir():
        for path in out.glob("*.pt"):
            load_checkpoint(path, kind=None)
    if situation == "dangling link":
        assert out.is_symlink() and not out.exists()
    # 3. What was asked for is there; or it is not, as the status says.
    missing = [file for file in command.files if not (out / file).is_file()
               or not (out / file).stat().st_size]
    told_after = situation == "full stdout"  # the stories, which are printed behind the trace
    assert not missing if there else missing or not command.files or told_after, shown
    if not command.files and there:
        assert ended.stdout.strip()
    if situation.endswith("not UTF-8"):
        text = ended.stdout.decode("utf-8")
        assert not command.training or "±" in text
    if command.training and situation in SIGNALS:
        goes_on(name, out, table)
    if command.training and situation == "full disk":  # the last good state is whole
        assert "optimizer" in load_checkpoint(out / "last.pt", kind=None)


def goes_on(name: str, out: Path, table: Table) -> None:
    """A stopped training can be resumed, from the step at which it was stopped."""
    step = load_checkpoint(out / "last.pt")["step"]
    assert step > 0
    train.main(["--resume", "--checkpoint_dir", str(out), "--max_steps", str(step + 1),
                "--data_dir", str(table.places["data"])])
    assert load_checkpoint(out / "final.pt")["step"] == step + 1


def test_every_script_is_in_the_table(capsys):
    packages = {path.parent for path in ROOT.glob("*/__init__.py")}
    scripts = {path.name if folder == ROOT else f"-m {folder.name}.{path.stem}"
               for folder in (ROOT, *packages) for path in folder.glob("*.py")
               if "__main__" in path.read_text(encoding="utf-8")}
    assert {command.script for command in COMMANDS.values()} == scripts
    # and every command of those that have several
    for script in (benchmark, evaluate):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        usage = re.search(r"\{([a-z,]+)\} \[flags\]", capsys.readouterr().out)[1]
        assert {name.split()[1] for name in COMMANDS if name.startswith(script.__name__ + ".py ")
                } == {*usage.split(",")}


def test_every_cell_is_run_or_has_a_reason():
    assert {*CELLS} | NOT_APPLICABLE.keys() == {(name, situation) for name in COMMANDS
                                                for situation in SITUATIONS}
    assert all(NOT_APPLICABLE.values()) and len(CELLS) > 150
