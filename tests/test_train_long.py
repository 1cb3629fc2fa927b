from cli import UserError

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, python

import train_long
from kinds.checkpoints import load_checkpoint
from train_config_long import PRESETS, STAGES, LongConfig
from train_long import main
from training import processes

OUTPUTS = {"data", "last.pt", "best.pt", "final.pt", "metrics.jsonl", "training_curves.png",
           "evaluation.json", "samples.md", "report.md", "settings.json"}


@pytest.fixture
def argv(tmp_path) -> list[str]:
    corpus = tmp_path / "stories.txt"
    corpus.write_text("".join(f"Once a cat had {i} hats. It was happy.\n<|endoftext|>\n"
                              for i in range(300)))
    words = dict(data_source=corpus, checkpoint_dir=tmp_path / "run", model_config="tiny",
                 max_steps=8, batch_tokens=512, vocab_size=300, seq_len=64, device="cpu",
                 precision="fp32", valid_rows=8, num_samples=0, save_every=2, log_every=1, draws=1,
                 compared_stories=2, written_stories=3, written_steps=4)
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def folder_of(argv: list[str]) -> Path:
    return Path(argv[argv.index("--checkpoint_dir") + 1])


def test_the_whole_way_and_nothing_twice(argv, capsys):
    main(argv)
    folder = folder_of(argv)
    assert {path.name for path in folder.iterdir()} == OUTPUTS
    text = capsys.readouterr().out
    assert [line[1:].split("]")[0] for line in text.splitlines() if line.startswith("[")] == list(
        STAGES)
    report = (folder / "report.md").read_text()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = evaluation["likelihood"]
    for value in (f"{figures['bits_per_byte']:.4f}", f"{figures['nelbo_nats_per_token']:.4f}",
                  "sin(pi t/2)^2", "cores", "training_curves.png", "8 of 8"):
        assert value in report
    assert report in text
    stories = (folder / "samples.md").read_text()
    assert stories.count("\n> ") == 3 == report.count("\n> ")
    # again: only the report is written anew, from what is there
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    main(argv)
    again = capsys.readouterr().out
    assert again.count("is there already") == 5
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"report.md"} and (folder / "report.md").read_text() == report


def test_a_stage_may_be_done_again_with_all_after_it(argv, capsys):
    main(argv)
    capsys.readouterr()
    main(["--checkpoint_dir", str(folder_of(argv)), "--from_stage", "samples",
          "--written_stories", "1"])
    text = capsys.readouterr().out
    assert text.count("is there already") == 4 and "[samples]\n[report]" in text
    assert "--written_stories changes from 3 to 1" in text
    assert (folder_of(argv) / "samples.md").read_text().count("\n> ") == 1
    # training again replaces the run
    main(["--checkpoint_dir", str(folder_of(argv)), "--from_stage", "train", "--seed", "5"])
    assert load_checkpoint(folder_of(argv) / "last.pt")["train_config"]["seed"] == 5
    assert "[data] is there already" in capsys.readouterr().out


def test_a_longer_run_goes_on_from_the_end_of_a_shorter(argv, capsys):
    main(argv)
    main(["--checkpoint_dir", str(folder_of(argv)), "--max_steps", "12"])
    text = capsys.readouterr().out
    assert "going on from" in text and "12 of 12" in text
    steps = [json.loads(line)["step"] for line in
             (folder_of(argv) / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps[-4:] == [9, 10, 11, 12]


def test_more_minutes_go_on_with_a_finished_run(argv, monkeypatch, capsys, fails):
    monkeypatch.setattr(train_long.LongRun, "time_steps", lambda self, steps: (False, 5.0))
    main(argv)
    folder = folder_of(argv)
    minutes = ["--checkpoint_dir", str(folder), "--minutes", "1"]
    main(minutes)
    steps = load_checkpoint(folder / "final.pt")["step"]
    # 86 % of a minute are 10 steps of five seconds, less what the 8 before took
    assert 8 < steps <= 8 + 10 and f"{steps} of {steps}" in capsys.readouterr().out
    main(minutes)  # the same command again changes nothing
    assert load_checkpoint(folder / "final.pt")["step"] == steps
    assert "has trained for" in fails(main, "--checkpoint_dir", folder, "--minutes", "0.00001")


def test_a_change_after_training_does_its_stage_again(argv, capsys):
    main(argv)
    capsys.readouterr()
    main(["--checkpoint_dir", str(folder_of(argv)), "--draws", "2", "--written_stories", "1"])
    text = capsys.readouterr().out
    assert text.count("is there already") == 3 and "[evaluate]\n" in text and "[samples]\n" in text
    assert "2 masks a row" in (folder_of(argv) / "report.md").read_text()
    main(["--checkpoint_dir", str(folder_of(argv))])
    assert capsys.readouterr().out.count("is there already") == 5


def test_a_finished_training_is_not_said_to_be_another(argv, fails):
    main(argv)
    folder = folder_of(argv)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "--dropout --lr --model_config: the training in" in fails(
        main, "--checkpoint_dir", folder, "--model_config", "micro", "--lr", "0.1", "--dropout",
        "0.3")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_minutes_that_are_over_before_the_first_step(argv, monkeypatch, fails):
    monkeypatch.setattr(train_long.LongRun, "time_steps", lambda self, steps: (False, 50.0))
    at = argv.index("--max_steps")
    argv[at:at + 2] = ["--minutes", "0.5"]
    assert "are spent already and a step takes 50.00 s" in fails(main, *argv)
    assert not (folder_of(argv) / "last.pt").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["--minutes", "inf"], "must be a number"),
    (["--minutes", "5", "--max_steps", "5"], "--minutes and --max_steps: give one"),
    (["--resume"], "last.pt to continue from"), (["--condition_dropout", "0.2"], "belongs to"),
    (["--written_steps", "200000"], "--steps 200000"), (["--seq_len", "17"], "multiple of 16"),
    (["--vocab_size", "5"], "--vocab_size"), (["--data_source", "nowhere.txt"], "no such file"),
    (["--skip_data_prep", "--from_stage", "data"], "give one of them")])
def test_what_cannot_work_is_said_at_once(words, message, tmp_path, fails):
    assert message in fails(main, "--checkpoint_dir", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_data_of_another_source_is_neither_used_nor_replaced(argv, tmp_path, fails):
    main(argv)
    other = tmp_path / "other.txt"
    other.write_text(Path(argv[1]).read_text())
    run = ["--checkpoint_dir", folder_of(argv)]
    written = (Path(folder_of(argv)) / "final.pt").read_bytes()
    main([*map(str, run), "--data_source", str(other)])  # the same text elsewhere
    assert (Path(folder_of(argv)) / "final.pt").read_bytes() == written
    other.write_text(other.read_text() + "One more story.\n<|endoftext|>\n")
    for flags, message in ((["--data_source", other], "not from other.txt"),
                           (["--vocab_size", "290"], "another --vocab_size"),
                           (["--overwrite", "--data_source", other], "--from_stage data"),
                           (["--overwrite", "--vocab_size", "290"], "another --vocab_size"),
                           (["--preset", "gpu16gb"], "was started with laptop")):
        assert message in fails(main, *run, *flags)
    # a data folder that is not this run's own is never replaced by something else
    data = tmp_path / "mine"
    (folder_of(argv) / "data").rename(data)
    before = (data / "meta.json").read_bytes()
    assert f"would replace {data}" in fails(main, "--checkpoint_dir", tmp_path / "new",
                                            "--data_dir", data, "--from_stage", "data")
    assert (data / "meta.json").read_bytes() == before
    assert "another --seq_len" in fails(main, "--checkpoint_dir", tmp_path / "new", "--data_dir",
                                        data, "--seq_len", "32")


def test_energy_is_told_for_a_whole_run_only():
    lines = [{"tokens": 10, "epoch": 1.0, "seconds": 100.0, "mfu": 0.5, "tokens_per_second": 1.0}]
    evaluation = {"kind": "autoregressive", "protocol": "exact", "likelihood": dict.fromkeys((
        "bits_per_byte", "bits_per_byte_standard_error", "nelbo_nats_per_token",
        "nelbo_standard_error", "perplexity"), 1.0)}
    session = {"command": "train_long.py", "machine": "m", "precision": "fp32", "processes": 1,
               "compiled": False, "joules": 50.0}
    for seconds, told in ((100.0, "5.000 J/token"), (60.0, "was killed in between")):
        assert told in train_long.report_text(LongConfig(), [session | {"seconds": seconds}],
                                              {"step": 1, "command": "x"}, evaluation, lines)
    del session["command"]  # as older runs have it
    assert "`the command`" in train_long.report_text(
        LongConfig(), [session | {"seconds": 1.0}], {"step": 1, "command": "the command"},
        evaluation, lines)


def test_other_processes_leave_after_training(tmp_path, monkeypatch):
    """They would wait for the evaluation, which may take longer than a collective call may."""
    run = train_long.LongRun(LongConfig(checkpoint_dir=str(tmp_path / "run")), set(),
                             processes.Processes(rank=1))
    monkeypatch.setattr(train_long.LongRun, "do_train", lambda self: done.append("train"))
    done: list[str] = []
    run.run()
    assert done == ["train"]


def test_killed_anywhere_it_goes_on(argv):
    """A real process, killed in the middle of its training, and the same command again."""
    folder = folder_of(argv)
    argv[argv.index("tiny")] = "micro"
    argv[argv.index("--max_steps") + 1] = "40"
    process = subprocess.Popen(python(ROOT / "train_long.py", *argv), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (
            log.exists() and len(log.read_text().splitlines()) > 8):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (folder / "final.pt").exists()
    done = subprocess.run(python(ROOT / "train_long.py", *argv), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[data] is there already" in done.stdout and "going on from" in done.stdout
    assert {path.name for path in folder.iterdir()} == OUTPUTS
    assert load_checkpoint(folder / "final.pt")["step"] == 40
    assert "--max_steps 40" in (folder / "report.md").read_text()


def test_minutes_decide_the_steps_of_this_machine(argv, monkeypatch, capsys):
    at = argv.index("--max_steps")
    argv[at:at + 2] = ["--minutes", "0.2"]
    monkeypatch.setattr("training.building.compile_blocks", lambda *args: "not in this test")
    main(argv)
    text = capsys.readouterr().out
    settings = json.loads((folder_of(argv) / "settings.json").read_text())
    steps = settings["settings"]["max_steps"]
    assert f"{steps:,} steps fit into 0.2 minutes" in text and steps > 1
    assert load_checkpoint(folder_of(argv) / "final.pt")["step"] == steps
    # ten validations, in a longer run of this folder too
    assert load_checkpoint(folder_of(argv) / "last.pt")["train_config"]["valid_every"] == max(
        1, steps // 10)
    assert settings["settings"]["valid_every"] == 0


def test_a_run_too_short_to_be_compiled_is_timed_as_it_will_run(tmp_path, monkeypatch):
    def time_steps(self, max_steps: int) -> tuple[bool, float]:
        compiled = max_steps >= 1000 and self.config.compile is not False
        return compiled, 0.1 if compiled else 0.2

    monkeypatch.setattr(train_long.LongRun, "time_steps", time_steps)

    def steps(**settings) -> int:
        config = LongConfig(checkpoint_dir=str(tmp_path / "x"), **settings)
        return train_long.LongRun(config, set(settings), processes.Processes()).steps_that_fit()

    assert steps(minutes=10.0) == pytest.approx(5160, abs=20)  # 14 % is for the other stages
    assert steps(minutes=1.0) == pytest.approx(258, abs=5)
    assert steps(minutes=1.0, compile=True) == pytest.approx(516, abs=10)
    assert steps(minutes=10.0, compile=False) == pytest.approx(2580, abs=10)


def test_the_twin_goes_the_same_way(argv, capsys):
    main([*argv, "--objective", "autoregressive", "--num_samples", "1"])
    report = (folder_of(argv) / "report.md").read_text()
    assert "NLL, nats/token" in report and "sin(pi" not in report
    assert json.loads((folder_of(argv) / "evaluation.json").read_text())["kind"] == "autoregressive"


def test_presets_are_sound(tmp_path):
    for name, preset in PRESETS.items():
        LongConfig(**{**preset, "preset": name}).check()
    assert set(PRESETS) == {"laptop", "gpu16gb", "full"}
    run = train_long.LongRun(LongConfig(preset="gpu16gb", checkpoint_dir=str(tmp_path / "x"),
                                        max_steps=7), {"preset", "max_steps"},
                             processes.Processes())
    assert run.config.model_config == "medium" and run.config.max_steps == 7  # flags win
    assert run.config.data_dir == str(tmp_path / "x" / "data")


def test_bad_input_is_one_line_and_changes_nothing(argv, tmp_path, fails):
    folder = folder_of(argv)
    for changes, message in ((["--skip_data_prep"], "--skip_data_prep: no data"),
                             (["--quick"], "--preset"), (["--draws", "0"], "--draws"),
                             (["--minutes", "-1"], "--minutes"), (["--dropout", "1"], "--dropout"),
                             (["--compared_stories", "1"], "self-BLEU"),
                             (["--from_stage", "lunch"], "--from_stage")):
        assert message in fails(main, *argv, *changes)
        assert not folder.exists()
    folder.mkdir()
    (folder / "settings.json").write_text("{")
    assert "does not hold a run's settings" in fails(main, *argv)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "last.pt").touch()
    assert "holds a run of train.py" in fails(main, *argv)


def test_settings_that_a_run_cannot_change_are_refused(argv, fails):
    main(argv)
    error = fails(main, "--checkpoint_dir", folder_of(argv), "--batch_tokens", "1024",
                  "--max_steps", "12")
    assert "--batch_tokens" in error and "cannot change" in error


def test_settings_survive_a_mistyped_flag(argv):
    main(argv)
    before = (folder_of(argv) / "settings.json").read_text()
    with pytest.raises(UserError, match="--dropout"):
        main(["--checkpoint_dir", str(folder_of(argv)), "--dropout", "3"])
    assert (folder_of(argv) / "settings.json").read_text() == before
