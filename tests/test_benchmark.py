import json

import pytest
import torch

import benchmark
from benchmark import ARMS, Textbook, TrainBenchmark, main, own_step, textbook_step
from model import MODEL_CONFIGS

SMALL = ["--model_config", "tiny", "--batch", "2", "--seq_len", "16", "--vocab_size", "50",
         "--steps", "2", "--device", "cpu"]


def test_train_prints_and_writes_paired_figures(tmp_path, capsys):
    path = tmp_path / "figures" / "train.json"
    main(["train", *SMALL, "--arms", "textbook", "eager", "--json", str(path)])
    text = capsys.readouterr().out
    assert "textbook" in text and "eager" in text and "compiled" not in text
    result = json.loads(path.read_text())
    arms = result["arms"]
    assert set(arms) == {"textbook", "eager"} and arms["textbook"]["speedup"] == 1
    assert arms["textbook"]["memory_share"] == 1
    for row in arms.values():
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0
        assert row["peak_memory_bytes"] > 2**27  # torch alone
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
    # the ratio is that of the pairs, not of two medians
    pairs = [a / b for a, b in zip(*(result["seconds"][arm] for arm in ("textbook", "eager")),
                                   strict=True)]
    assert arms["eager"]["speedup"] == pytest.approx(sum(pairs) / 2)
    assert arms["eager"]["mfu"] == pytest.approx(
        result["step_flops"] / arms["eager"]["seconds"] / result["peak_flops"])


def test_both_arms_learn_the_batch(monkeypatch):
    """A benchmark of a step that trains nothing would be worth nothing."""
    config = TrainBenchmark(model_config="tiny", batch=4, seq_len=16, vocab_size=50, device="cpu",
                            precision="fp32")
    losses = []
    real = torch.Tensor.backward

    def backward(tensor, *args, **kwargs):
        losses.append(tensor.item())
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for make in (lambda: textbook_step(config, torch.device("cpu")),
                 lambda: own_step(config, torch.device("cpu"), compiled=False)):
        losses.clear()
        step = make()
        for _ in range(30):
            step()
        assert losses[0] > 3 and losses[-1] < 0.8 * losses[0]


def test_the_textbook_model_is_of_the_same_size():
    with torch.device("meta"):
        book = Textbook(TrainBenchmark(model_config="small"))
        own = benchmark.create_model("small")
    counts = [sum(p.numel() for p in model.parameters()) for model in (book, own)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("argv, message", [
    (["train", "--model_config", "huge"], "choose from"), (["train", "--steps", "0"], "--steps"),
    (["train", "--arms", "fast"], ", ".join(ARMS)), (["train", "--seq_len", "2"], "--seq_len"),
    (["train", "--batch", "0"], "--batch"), (["train", "--vocab_size", "3"], "--vocab_size")])
def test_bad_settings(argv, message, fails):
    assert message in fails(main, *argv)


def test_an_unknown_benchmark_names_the_known_ones(capsys):
    for argv in (["walk"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "train" in capsys.readouterr().err
    assert "small" in MODEL_CONFIGS
