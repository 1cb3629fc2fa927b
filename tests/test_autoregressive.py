import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SMALL

import train
from corpus.rows import TokenRows, bucket_batches
from corpus.tokens import BOS, EOS, MASK, PAD
from diffusion import DiscreteDiffusion
from kinds.autoregressive import Autoregressive, fill_from_the_left
from kinds.checkpoints import load_checkpoint
from kinds.kind import drawn_lengths
from model import DiffusionTransformer
from network.attention import Cache
from network.layers import ModelConfig
from sampling.sampler import Sampler


@pytest.fixture
def twin() -> DiffusionTransformer:
    """A causal toy with random weights over three letters, rows of at most 6."""
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=7, max_len=6,
                                             causal=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_input_and_targets():
    rows = torch.tensor([[BOS, 7, 8, EOS, PAD], [9, 7, 8, 7, 9], [7, 8, EOS, PAD, PAD]])
    batch = Autoregressive().corrupt_batch(rows)
    assert batch.noisy.tolist() == [[PAD, BOS, 7, 8, EOS], [PAD, 9, 7, 8, 7], [PAD, 7, 8, EOS, PAD]]
    # [BOS] is given, [EOS] is predicted, also the first token of a row without [BOS]
    assert batch.masked.tolist() == [[False, True, True, True, False], [True] * 5,
                                     [True, True, True, False, False]]
    assert batch.weight.sum().item() == pytest.approx(1)


def test_probabilities_of_all_texts_add_up_to_one(twin):
    """Every text of up to 3 letters with its [EOS], and every beginning of 4 letters."""
    process, total = Autoregressive(), 0.0
    for length in range(5):
        ends = [EOS] if length < 4 else []
        rows = [[BOS, *letters, *ends] for letters in itertools.product((4, 5, 6), repeat=length)]
        batch = process.corrupt_batch(torch.tensor(rows))
        with torch.no_grad():
            log_p = twin(batch.noisy).log_softmax(-1).gather(2, batch.tokens[..., None])[..., 0]
        total += log_p.masked_fill(~batch.masked, 0).sum(1).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_likelihood_is_the_sum_over_rows(twin):
    rows = np.array([[BOS, 4, 5, EOS, PAD], [BOS, 6, 6, 4, EOS]])
    bound = Autoregressive().nelbo(twin, [rows[:1, :4], rows[1:]])
    logits = [twin(torch.tensor([[PAD, *row[:-1]]])).log_softmax(-1)[0] for row in rows]
    expected = [-sum(logits[0][i, t].item() for i, t in ((1, 4), (2, 5), (3, EOS))),
                -sum(logits[1][i, t].item() for i, t in ((1, 6), (2, 6), (3, 4), (4, EOS)))]
    assert bound.row_nats()[0] == pytest.approx(expected, rel=1e-5)
    # nats/token are per token of text: [EOS] is paid for and not counted
    assert bound.nats_per_token == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_the_code_of_kinds_and_lengths():
    histogram = {"story": {"5": 3, "6": 1}, "start": {"8": 2}, "middle": {}, "end": {"4": 2}}
    meta = {"length_histogram": histogram, "seq_len": 8}
    process, total = Autoregressive(), 8 + 4 * 8
    story, start = [BOS, 4, 5, 6, EOS], [BOS, 4, 5, 6, 4, 5, 6, 4]
    assert process.extra_nats(meta, [story]) == pytest.approx(math.log(total / (4 + 8)))
    assert process.extra_nats(meta, [story, start]) == pytest.approx(
        math.log(total / (4 + 8)) + math.log(total / (2 + 8)) + math.log((2 + 8) / (1 + 2)))


def test_no_token_sees_a_later_one(twin):
    rows = torch.tensor([[BOS, 4, 5, 6, 4, EOS]])
    other = rows.clone()
    other[0, 4] = 6
    with torch.no_grad():
        a, b = (twin(Autoregressive().corrupt_batch(row).noisy) for row in (rows, other))
    torch.testing.assert_close(a[0, :5], b[0, :5])
    assert not torch.allclose(a[0, 5], b[0, 5])


def test_drawn_stories_follow_the_distribution(twin):
    rows = Autoregressive().write(twin, [0] * 4000, Sampler(), seed=1)
    assert all(row[0] == BOS and len(row) <= 6 and (row[1:-1] > EOS).all() for row in rows)
    first = np.bincount([row[1] for row in rows], minlength=7) / len(rows)
    with torch.no_grad():
        expected = twin(torch.tensor([[PAD, BOS]]))[0, 1].softmax(-1).numpy()
    assert np.abs(first - expected).max() < 4 * 0.5 / len(rows) ** 0.5
    again = Autoregressive().write(twin, [0] * 3, Sampler(), seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(again, rows, strict=False))
    greedy = Autoregressive().write(twin, [0] * 2, Sampler(temperature=0.0))
    assert np.array_equal(*greedy)


def test_stories_of_either_kind(twin):
    histogram = {"story": {"5": 1}}
    model = DiffusionTransformer(SMALL).eval()
    for kind, network, length in ((Autoregressive(), twin, None), (DiscreteDiffusion(), model, 5)):
        lengths = drawn_lengths(histogram, 3, 0, network.config.max_len)
        rows = kind.write(network, lengths, Sampler(steps=2), seed=0)
        assert len(rows) == 3 and all(length in (None, len(row)) for row in rows)


def test_the_twin_trains_resumes_and_keeps_its_kind(long_data_dir, tmp_path, fails, capsys):
    folder = tmp_path / "twin"
    argv = ["--data_dir", long_data_dir, "--checkpoint_dir", folder, "--model_config", "tiny",
            "--objective", "autoregressive", "--batch_tokens", "512", "--valid_every", "10",
            "--valid_rows", "16", "--num_samples", "1", "--device", "cpu", "--precision", "fp32"]
    train.main([*map(str, argv), "--max_steps", "20"])
    text = capsys.readouterr().out
    assert text.count("NLL") == 3 and "NELBO" not in text and text.count("  | ") == 2
    checkpoint = load_checkpoint(folder / "best.pt", kind="autoregressive")
    assert checkpoint["model_config"]["causal"]
    error = fails(train.main, "--resume", "--checkpoint_dir", folder, "--objective", "elbo")
    assert "--objective" in error and "cannot change" in error
    train.main(["--resume", "--checkpoint_dir", str(folder), "--max_steps", "22"])
    assert load_checkpoint(folder / "last.pt", kind=None)["step"] == 22


def test_training_lowers_the_likelihood_and_the_bound_alike(long_data_dir):
    """On the same rows the twin's nats per token start near log V, as diffusion's do."""
    rows = TokenRows(long_data_dir, "val")
    batches = [rows.batch(part) for part in bucket_batches(rows.lengths, 2048)]
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=400,
                                             causal=True))
    bound = Autoregressive().nelbo(model, batches)
    per_token = bound.total_nats / (bound.n.sum() + sum(int((b == EOS).sum()) for b in batches))
    assert per_token == pytest.approx(math.log(400), abs=0.05)


def test_a_cache_changes_nothing_but_the_work(twin):
    """Token by token and in pieces behind a cache, the network gives what it gives for whole rows;
    with other positions it does not."""
    rows = torch.tensor([[PAD, BOS, 4, 5, 6, 4], [PAD, BOS, 6, 6, 5, 4]])
    whole = twin.hidden(rows)
    for pieces in ((1, 1, 1, 1, 1, 1), (2, 3, 1), (4, 2), (6,)):
        cache, start = Cache(), 0
        for size in pieces:
            part = twin.hidden(rows[:, start:start + size], view=twin.view(size, cache=cache))
            torch.testing.assert_close(part, whole[:, start:start + size], rtol=1e-4, atol=1e-5)
            start += size
            assert cache.length == start
    cache = Cache()
    twin.hidden(rows[:, :5], view=twin.view(5, cache=cache))
    cache.keep_rows(torch.tensor([False, True]))
    last = twin.hidden(rows[1:, 5:], view=twin.view(torch.tensor([[5]]), cache=cache))
    torch.testing.assert_close(last, whole[1:, 5:], rtol=1e-4, atol=1e-5)
    cache.keep_tokens(5)  # that pass only looked
    again = twin.hidden(rows[1:, 5:], view=twin.view(1, cache=cache))
    torch.testing.assert_close(again, last)
    shifted = twin.hidden(rows, view=twin.view(torch.tensor([0, 1, 2, 3, 5, 4])))
    assert not torch.allclose(shifted, whole, atol=1e-3)
    with pytest.raises(ValueError, match="max_len"):
        twin.view(1, cache=cache)


def test_every_token_goes_through_the_network_once(twin, monkeypatch):
    given, hidden = [], twin.hidden
    monkeypatch.setattr(twin, "hidden", lambda tokens, **more: given.append(
        tokens.numel()) or hidden(tokens, **more))
    rows = np.array([[BOS, 4, MASK, MASK, MASK, MASK]])
    filled = fill_from_the_left(twin, rows, Sampler(), may_end=False)
    assert sum(given) == 6 and given[0] == 3 and (filled[0, 2:] > EOS).all()
