import pytest

from metrics import MetricsLog, main


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
