import pytest

from measuring.curves import best_so_far, main
from training.log import MetricsLog


def test_lines_are_appended_and_taken_back(tmp_path):
    log = MetricsLog(tmp_path)
    log.rewind(5)  # nothing there yet
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    log.rewind(2)
    log.write(3, {"valid_nelbo": 2.0})
    assert log.path.read_text() == (
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "valid_nelbo": 2.0}\n')
    log.close()


@pytest.mark.parametrize("lines", [0, 3])
def test_curves_are_drawn_again(tmp_path, lines, capsys):
    log = MetricsLog(tmp_path)
    log.path.touch()
    for step in range(lines):
        log.write(step, {"loss": 2.0, "lr": 0.1, "valid_nelbo": 1.5})
    main(["--checkpoint_dir", str(tmp_path)])
    assert "training_curves.png" in capsys.readouterr().out
    assert log.curves.read_bytes().startswith(b"\x89PNG")


def test_no_run_in_the_folder(tmp_path, fails):
    assert "--checkpoint_dir" in fails(main, "--checkpoint_dir", tmp_path)


def test_runs_are_compared_by_their_best_so_far(tmp_path, capsys, fails):
    folders = [tmp_path / name for name in ("diffusion", "twin")]
    for folder, values in zip(folders, ([3.0, 2.0, 2.5, 1.5], [2.5, 2.0, 2.2, 2.4]), strict=True):
        folder.mkdir()
        for epoch, value in enumerate(values):
            MetricsLog(folder).write(epoch, {"epoch": epoch, "valid_bits_per_byte": value})
        MetricsLog(folder).write(9, {"loss": 1.0})
    assert best_so_far(MetricsLog(folders[1]).lines()) == (
        [0, 1, 2, 3], [2.5, 2.0, 2.2, 2.4], [2.5, 2.0, 2.0, 2.0])
    output = tmp_path / "both.png"
    main(["--compare", *map(str, folders), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    before = output.read_bytes()
    with open(folders[1] / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "valid_b')  # a killed run
    main(["--compare", *map(str, folders), "--output", str(tmp_path / "new" / "both.png")])
    assert (tmp_path / "new" / "both.png").read_bytes() == before
    assert "belongs to --compare" in fails(main, "--output", output, "--checkpoint_dir", folders[0])
    assert "names the folders" in fails(main, "--compare", folders[0], "--checkpoint_dir", "x")
    (folders[1] / "metrics.jsonl").write_text("")
    assert "no validation" in fails(main, "--compare", *folders, "--output", output)
    assert output.read_bytes() == before


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 1.0})
    real = open

    class Full:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:7])  # as a disk with some bytes left does
    monkeypatch.setattr("builtins.open", Full)
    log.write(2, {"loss": 0.5})
    log.write(3, {"loss": 0.25})
    assert capsys.readouterr().err.count("No space left") == 1  # said once
    monkeypatch.undo()
    assert log.path.read_text() == '{"step": 1, "loss": 1.0}\n'  # no half of a line
    log.close()
    assert "lacks its last 2 lines" in capsys.readouterr().err
    log.write(4, {"loss": 0.1})
    assert [line["step"] for line in log.lines()] == [1, 2, 3, 4]
