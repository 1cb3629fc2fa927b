import json

import pytest
import torch

import benchmark
from benchmark import (
    SampleBenchmark,
    Textbook,
    TrainBenchmark,
    main,
    own_step,
    textbook_sampling,
    textbook_step,
)
from data_prep import BOS, EOS, MASK
from model import MODEL_CONFIGS

SMALL = ["--model_config", "tiny", "--batch", "2", "--seq_len", "16", "--vocab_size", "50",
         "--repeats", "2", "--device", "cpu"]


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


def test_sample_prints_and_writes_paired_figures(tmp_path, capsys, checkpoint):
    path = tmp_path / "sample.json"
    main(["sample", *SMALL, "--steps", "3", "--json", str(path)])
    text, arms = capsys.readouterr().out, json.loads(path.read_text())["arms"]
    assert "2 x 14 tokens, random order, cosine pace" in text and "MFU" not in text
    for row in arms.values():
        assert row["evaluations"] == 3 and row["tokens"] == 28
        assert row["tokens_per_cpu_second"] == pytest.approx(28 / row["cpu_seconds"])
        assert row["peak_memory_bytes"] > 2**27
    # an adaptive pace needs fewer evaluations where the network is sure
    main(["sample", "--checkpoint", str(checkpoint), "--pace", "threshold", "--threshold", "0.001",
          "--repeats", "1", "--no-memory", "--seq_len", "20", "--device", "cpu", "--json",
          str(path)])
    assert json.loads(path.read_text())["arms"]["own"]["evaluations"] == 1


def test_the_textbook_sampler_asks_for_every_logit_in_every_step(table_model):
    rows = torch.tensor([[BOS, MASK, 5, MASK, EOS]] * 3000)
    seen = []
    real = table_model.head
    table_model.head = lambda hidden: seen.append(real(hidden)) or seen[-1]
    table_model.forward = lambda tokens: table_model.head(table_model.hidden(tokens))
    config = SampleBenchmark(steps=2)
    assert textbook_sampling(config, table_model, rows)() == {"evaluations": 2, "tokens": 6000}
    assert len(seen) == 2 and seen[0].shape == (3000, 5, 7)


def test_the_textbook_model_is_of_the_same_size():
    with torch.device("meta"):
        book = Textbook(TrainBenchmark(model_config="small"))
        own = benchmark.create_model("small")
    counts = [sum(p.numel() for p in model.parameters()) for model in (book, own)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("argv, message", [
    (["train", "--model_config", "huge"], "choose from"),
    (["train", "--repeats", "0"], "--repeats"), (["train", "--seq_len", "2"], "--seq_len"),
    (["train", "--arms", "fast"], "textbook, eager, compiled"),
    (["sample", "--arms", "eager"], "textbook, own"), (["sample", "--steps", "0"], "--steps"),
    (["sample", "--pace", "threshold"], "give a --checkpoint"),
    (["sample", "--eta", "0.1"], "--remask"), (["sample", "--guidance", "3"], "no condition"),
    (["train", "--batch", "0"], "--batch"), (["train", "--vocab_size", "3"], "--vocab_size")])
def test_bad_settings(argv, message, fails):
    assert message in fails(main, *argv)


def test_an_unknown_benchmark_names_the_known_ones(capsys):
    for argv in (["walk"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "train" in capsys.readouterr().err
    assert "small" in MODEL_CONFIGS
