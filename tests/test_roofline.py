import dataclasses
import json

import pytest

from benchmark import main
from measuring.roofline import DEVICES, evaluations_of, floor_of, memory_of, pass_seconds
from model import MODEL_CONFIGS


def test_the_floor_is_that_of_the_larger_of_two(capsys):
    device = DEVICES["orin_nano_8gb"]
    for name, flop in (("xlarge", 60.6), ("xxlarge", 134.4)):
        floor = floor_of(MODEL_CONFIGS[name], "fp16", device, 256)
        assert floor["gflop"] == pytest.approx(flop, rel=0.25)
        assert floor["floor_seconds"] == max(floor["compute_seconds"], floor["weight_seconds"])
    half, whole, eighth = (floor_of(MODEL_CONFIGS["large"], precision, device, 256)
                           for precision in ("fp16", "fp32", "int8"))
    assert eighth["floor_seconds"] < half["floor_seconds"] < whole["floor_seconds"]
    assert whole["weight_megabytes"] == pytest.approx(2 * half["weight_megabytes"])
    memory = memory_of(MODEL_CONFIGS["large"], "fp16", 256, half["weight_megabytes"])
    assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"))
    main(["roofline"])
    text = capsys.readouterr().out
    assert "| xxlarge | int8 |" in text and "not measured on this device" in text
    assert "The largest that fits: xxlarge in fp32" in text


def test_writing_from_the_left(capsys):
    """Against figures worked out by hand: xlarge in FP16, 85M weights in its blocks and 6.3M in
    its head; 256 slots of 12 layers of 768 for keys and for values."""
    device, size = DEVICES["orin_nano_8gb"], MODEL_CONFIGS["xlarge"]
    read = 2 * (12 * 768 ** 2 * 12 + 8192 * 768) + 2 * 2 * 12 * 256 * 768
    one = pass_seconds(size, "fp16", device, 1, 256)
    assert one == pytest.approx(read / 102e9)
    assert pass_seconds(size, "fp16", device, 32, 256) == one  # the weights are what takes time
    products = 2 * 256 * (12 * 768 ** 2 * 12 + 8192 * 768) + 4 * 256 * (256 + 256) * 12 * 768
    assert pass_seconds(size, "fp16", device, 256, 256) == pytest.approx(products / 16.7e12)
    assert evaluations_of(4) == [1, 2, 4] and evaluations_of(6) == [1, 2, 4, 6]
    main(["roofline", "--block_sizes", "4", "--round_tokens", "2.5", "7"])
    line = next(line for line in capsys.readouterr().out.splitlines()
                if line.startswith("| xlarge | fp16 |") and line.count("|") == 7)
    cells = [cell.strip() for cell in line.split("|")][3:7]
    assert cells[0] == f"{1 / one:.0f}"
    assert cells[1] == f"{2 / one:.0f}/{4 / 3 / one:.0f}/{4 / 5 / one:.0f}"
    assert cells[2] == f"{2.5 / 2 / one:.0f}/{7 / 2 / one:.0f}"
    # three drafted tokens read a head of rank 128 over 4,096 ids in FP32
    assert cells[3] == f"{2.1 / (one + 3 * 4 * 128 * 4096 / 102e9):.0f}"


def test_a_measurement_beside_the_floor(tmp_path, capsys):
    path = tmp_path / "x.json"
    small = dataclasses.asdict(MODEL_CONFIGS["small"])
    path.write_text(json.dumps({"machine": "NVIDIA Jetson Orin Nano", "model_config": small,
                                "length": 256, "arms": {
        "tensorrt fp16": {"step_seconds": 0.005}, "onnxruntime fp16": {"step_seconds": 0.1}}}))
    main(["roofline", "--measured", str(path)])
    text = capsys.readouterr().out
    assert "tensorrt fp16: a step takes 5.00 ms, measured" in text and "onnxruntime" not in text
    floor = floor_of(MODEL_CONFIGS["small"], "fp16", DEVICES["orin_nano_8gb"], 256)
    assert f"{floor['floor_seconds'] / 0.005:.0%} of the floor's speed" in text


@pytest.mark.parametrize(("words", "message"), [
    (["--nfe", "0"], "must be positive"), (["--block_sizes", "0"], "must be positive"),
    (["--round_tokens", "9"], "from 1 to 8 tokens"),
    (["--headed_tokens", "4.5"], "from 1 to 4 tokens"), (["--draft_rank", "0"], "at least 1"),
    (["--measured", "nowhere.json"], "no such file")])
def test_mistakes(words, message, fails, tmp_path):
    assert message in fails(main, "roofline", *words)
    (tmp_path / "x.json").write_text("[1]")
    assert "is not what `benchmark.py device` wrote" in fails(main, "roofline", "--measured",
                                                            tmp_path / "x.json")
