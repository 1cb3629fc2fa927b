import json
import os
import shutil
import stat

import pytest

from measuring import device
from measuring.device import Board, main, percentile_95


@pytest.fixture
def measured(bundle, tmp_path, capsys):
    def run(*words: object) -> tuple[dict, str]:
        target = tmp_path / "figures.json"
        main(["--bundle", str(bundle), "--output", str(target), "--nfe", "2", "3", "--repeats",
              "2", "--length", "20", *map(str, words)])
        assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        return json.loads(target.read_text()), capsys.readouterr().out
    return run


def test_every_graph_is_timed_and_what_was_not_measured_is_said(measured):
    result, text = measured()
    assert list(result["arms"]) == ["onnxruntime fp32", "onnxruntime fp16", "onnxruntime int8"]
    for arm in result["arms"].values():
        assert 0 < arm["step_seconds"] <= arm["step_seconds_p95"]
        assert arm["cold_start_seconds"] > 0 and arm["watts"] is None
        assert arm["process_megabytes"] is None or arm["process_megabytes"] > 20
        for nfe, story in arm["stories"].items():
            assert story["seconds"] >= int(nfe) * 0.3 * arm["step_seconds"]
            assert story["tokens_per_second"] == pytest.approx(20 / story["seconds"])
            assert story["joules"] is None
    assert result["judged_on"] == "val" and "a story, NELBO of val rows\n" in text
    assert "TensorRT and the Jetson were not measured" in text and "not measured |" in text


def test_the_checkpoint_beside_them_and_a_judge(measured, sharp_checkpoint, twin):
    result, text = measured("--checkpoint", sharp_checkpoint, "--twin", twin, "--judged", 3)
    assert "torch fp32" in result["arms"]
    judged = {name: [story["generative_perplexity"] for story in arm["stories"].values()]
              for name, arm in result["arms"].items()}
    # the same stories, and so the same figure
    assert judged["torch fp32"] == pytest.approx(judged["onnxruntime fp32"])
    assert result["arms"]["torch fp32"]["nelbo"] == pytest.approx(
        result["arms"]["onnxruntime fp32"]["nelbo"], abs=1e-4)


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for tegrastats")
def test_power_and_memory_of_a_jetson(measured, tmp_path, monkeypatch):
    board = Board()
    board.read("11-24-2026 RAM 2871/7620MB (lfb 4x4MB) CPU [2%@729] VDD_IN 5032mW/4990mW VDD_CPU "
               "1mW/1mW")
    board.read("RAM 3000/7620MB VDD_IN 7000mW/5000mW")
    board.read("no such line")
    assert board.figures() == {"watts": pytest.approx(6.016), "board_megabytes": 3000}
    script = tmp_path / "tegrastats"
    script.write_text("#!/bin/sh\nwhile true; do echo 'RAM 2000/7620MB VDD_IN 6000mW/6000mW'; "
                      "sleep 0.01; done\n")
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result, text = measured("--power")
    for arm in result["arms"].values():
        assert arm["watts"] == pytest.approx(6.0) and arm["board_megabytes"] == 2000
        for story in arm["stories"].values():
            assert story["joules"] == pytest.approx(6 * story["seconds"])


def test_without_onnx_runtime_nothing_else_is_hidden(bundle, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert "nothing to time" in fails(main, "--bundle", bundle, "--output", tmp_path / "x.json")
    shutil.copytree(bundle, tmp_path / "copy")
    for name in ("step_fp16.engine", "encoder.engine"):
        (tmp_path / "copy" / name).write_bytes(b"")
    config = device.DeviceBenchmark(bundle=str(tmp_path / "copy"))
    assert list(device.arms_of(config)) == ["tensorrt fp16"]
    assert "its arms are not measured" in capsys.readouterr().out


def test_percentile():
    assert percentile_95([1.0]) == 1.0 and percentile_95(list(map(float, range(1, 101)))) == 95.0


@pytest.mark.parametrize(("words", "message"), [
    (["--nfe", "0"], "1 or more"), (["--repeats", "0"], "at least 1"),
    (["--judged", "1"], "2 stories"), (["--length", "-1"], "0 or more"),
    (["--bundle", "nowhere"], "no bundle"), (["--length", "500"], "hold at most 254"),
    (["--steps", "3"], "--steps"), (["--power"], "--power: tegrastats"),
    (["--output", "nowhere/x.json"], "a folder that exists")])
def test_mistakes(words, message, bundle, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--bundle" not in words:
        words = [*words, "--bundle", bundle, *(["--nfe", "1", "--repeats", "1"]
                                               if "--power" in words else [])]
    assert message in fails(main, *words)
    assert not (tmp_path / "device_benchmark.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_outputs_that_cannot_be_written_are_found_before_the_work(bundle, tmp_path, fails,
                                                                  monkeypatch):
    monkeypatch.setattr(device, "measure", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "x.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in ("file/x.json", "link/x.json", ".", "x.json", "y.png", "n" * 300 + ".json"):
        fails(main, "--bundle", bundle, "--output", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
