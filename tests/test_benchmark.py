import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, chi_squared_p

import model
from benchmark import main
from corpus.tokens import BOS, EOS, MASK
from measuring import paired
from measuring.sampling_speed import SampleBenchmark, sensible_sampling, textbook_sampling
from measuring.training_speed import (
    Textbook,
    TrainBenchmark,
    compiled_step,
    own_step,
    textbook_step,
)
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
    # the one baseline that ran is the strongest
    assert result["strongest_baseline"] == "textbook"
    assert arms["eager"]["speedup_over_strongest"] == arms["eager"]["speedup"]
    assert arms["eager"]["mfu"] == pytest.approx(
        result["step_flops"] / arms["eager"]["seconds"] / result["peak_flops"])


class Timed(TrainBenchmark):
    """Arms that take as long as they say."""

    BASELINES, SECONDS = ("slow", "quick"), {"slow": 0.06, "quick": 0.02, "own": 0.01}

    def make(self, arm, device):
        return lambda: time.sleep(self.SECONDS[arm]) or {"tokens": 1}

    def describe(self, peak, arms):
        return {"what": "sleep"}


def test_the_headline_is_against_the_strongest_baseline(monkeypatch, capsys):
    monkeypatch.setattr(paired, "peak_flops", lambda *_, **__: 1e12)
    result = paired.run_benchmark(Timed(arms=["slow", "quick", "own"], device="cpu", repeats=3,
                                           precision="fp32", memory=False))
    assert result["strongest_baseline"] == "quick"
    speedups = {arm: row["speedup_over_strongest"] for arm, row in result["arms"].items()}
    assert speedups["quick"] == 1 and speedups["slow"] < 0.6 and 1.2 < speedups["own"] < 2.5
    paired.report(result)
    text = capsys.readouterr().out
    assert (f"strongest baseline here, quick: slow {speedups['slow']:.2f}, own "
            f"{speedups['own']:.2f}\n") in text


def test_the_textbook_steps_are_the_same_step(monkeypatch):
    """Otherwise the strong baselines would be strong by doing something else."""
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes its time
    config = TrainBenchmark(model_config="tiny", batch=4, seq_len=16, vocab_size=50, device="cpu",
                            precision="fp32")
    losses = {}
    for name, make in (("plain", textbook_step), ("compiled", compiled_step),
                       ("bf16", lambda *given: textbook_step(*given, bf16=True))):
        with pytest.MonkeyPatch.context() as patch:
            seen = losses[name] = []
            real = torch.Tensor.backward
            patch.setattr(torch.Tensor, "backward", lambda tensor, *rest, seen=seen, real=real: (
                seen.append(tensor.item()), real(tensor, *rest))[1])
            step = make(config, torch.device("cpu"))
            for _ in range(8):
                step()
    del losses["compiled"][0]  # the call that compiles it; nothing was learned from that
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["bf16"] != losses["plain"] and losses["plain"][-1] < losses["plain"][0]


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
    assert set(arms) == {"sensible", "textbook", "own"} and "x strongest" in text
    # peers are named with what was measured, by whom and where; the figures are those of the file
    peers = json.loads((ROOT / "bench" / "peers.json").read_text())
    own, *others = peers["figures"].values()
    assert peers["by"] in text and peers["machine"] in text and len(others) == 4
    for name, figure in list(peers["figures"].items())[1:]:
        assert f"{name} {figure:g} (this project is {own / figure:.2f} times as fast)" in text
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


def test_the_sensible_sampler_draws_from_the_same_distribution(table_model):
    """One step over rows with two hidden positions: each token by its probability; and logits are
    asked for at hidden positions alone."""
    count = 6000
    rows = torch.tensor([[BOS, MASK, 5, MASK, EOS]] * count)
    asked, drawn = [], []
    real = table_model.head
    table_model.head = lambda hidden: asked.append(hidden.shape) or real(hidden)

    with pytest.MonkeyPatch.context() as patch:
        real_where = torch.where
        patch.setattr(torch, "where", lambda condition, new, old: (
            drawn.append(new), real_where(condition, new, old))[1])
        figures = sensible_sampling(SampleBenchmark(steps=1), table_model, rows)()
    assert figures == {"evaluations": 1, "tokens": 2 * count} and asked == [(2 * count, 7)]
    expected = table_model.probabilities((MASK, 5, MASK))[[0, 2]]
    for place in range(2):
        observed = np.bincount(drawn[-1][place::2].numpy(), minlength=7)[4:]
        assert chi_squared_p(observed.astype(float), expected[place] * count) > 0.001
    table_model.head = lambda hidden: asked.append(len(hidden)) or real(hidden)
    asked.clear()
    sensible_sampling(SampleBenchmark(steps=4), table_model, rows)()
    assert asked[0] == 2 * count and asked == sorted(asked, reverse=True)
    assert asked[1] == pytest.approx(1.5 * count, rel=0.05)  # a quarter was due


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(paired, "run_benchmark", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.iterdir())
    for name in ("file/x.json", "file/deeper/x.json", "link/x.json", ".", "n" * 300 + ".json"):
        fails(main, "train", "--json", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_the_textbook_model_is_of_the_same_size():
    with torch.device("meta"):
        book = Textbook(TrainBenchmark(model_config="small"))
        own = model.create_model("small")
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


def test_a_speed_up_counts_tokens_not_calls():
    """Half the seconds for a quarter of the tokens: half as fast."""
    assert paired.paired_speedup([(2.0, 0.0, {"tokens": 100})], [(1.0, 0.0, {"tokens": 25})]) == 0.5
