"""The head that tells a draft what stands before each token: its training, and that it costs no
exactness."""

from cli import UserError

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, chi_squared_p

import generate
import train
from block_diffusion import NextTokens
from corpus.tokens import BOS, EOS, MASK, PAD
from kinds import drafts
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from kinds.drafts import CHAIN, DraftTraining, chain
from kinds.registry import kind_of
from model import MODEL_CONFIGS, DiffusionTransformer
from network.draft_head import DraftHead as TorchHead
from network.layers import Linear, ModelConfig
from sampling.cached import CachedModel, head_parts
from sampling.draft_head import DraftHead
from sampling.left_to_right import draft_of, rows_of, write_causal, write_verified
from sampling.sampler import Sampler


@pytest.fixture
def model() -> DiffusionTransformer:
    """Over three letters, with a head that says much and nothing true."""
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=7, max_len=16,
                                             draft_rank=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def test_a_draft_is_drawn_from_what_is_told_of_it(model):
    """q of the first place is the network's, of the others the network's and the head's."""
    def begun() -> CachedModel:
        reader = CachedModel(model, Sampler(steps=1))
        reader.begin(np.arange(2))
        reader.read(np.array([[PAD, BOS], [PAD, BOS]]))
        return reader
    sampler, reader = Sampler(steps=1), begun()
    last, uniform = np.array([4, 5]), np.random.default_rng(0).random((2, 4))
    draft, q = draft_of(reader, last, 4, sampler, uniform)
    block = np.array([[4, 1, 1, 1], [5, 1, 1, 1]])
    logits = torch.from_numpy(reader.look(block, np.arange(1, 4)))
    logits[:, 1:] += model.draft.told(torch.from_numpy(draft[:, :-1])).detach()
    np.testing.assert_allclose(q, logits.softmax(-1).numpy(), atol=1e-6)
    # in three evaluations the network sees every token before the next, and the head has no say
    _, alone = draft_of(reader, last, 4, Sampler(steps=3), uniform)
    model.draft.behind.weight.data.zero_()
    reader = begun()
    np.testing.assert_array_equal(alone, draft_of(reader, last, 4, Sampler(steps=3), uniform)[1])
    assert not np.allclose(q, draft_of(reader, last, 4, sampler, uniform)[1])


def test_a_head_that_lies_costs_no_exactness(model):
    """Verified drafts follow the causal mode's distribution over all texts of two letters."""
    count, sampler, starts = 4000, Sampler(steps=1), [np.array([BOS])] * 4000
    reader = CachedModel(model, sampler)
    rows = rows_of(write_verified(reader, reader, starts, sampler, 4, 3, seed=1), starts)
    texts = [[BOS, EOS], *([BOS, a, b] for a in (4, 5, 6) for b in (EOS, 4, 5, 6))]
    reader = CachedModel(model, sampler)
    with torch.no_grad():
        chances = []
        for text in texts:
            reader.begin(np.arange(1))
            logits = reader.read(np.array([[PAD, *text[:-1]]]), logits=len(text) - 1)[0]
            log_p = torch.from_numpy(logits).double().log_softmax(-1)
            chances.append(log_p[np.arange(len(text) - 1), text[1:]].sum().exp().item())
    assert sum(chances) == pytest.approx(1, abs=1e-6)
    observed = np.array([sum(row.tolist() == text for row in rows) for text in texts])
    assert observed.sum() == count
    assert chi_squared_p(observed, count * np.array(chances)) > 0.001
    # and the test would notice a sampler of another distribution
    other = rows_of(write_causal(CachedModel(model, sampler), starts, Sampler(temperature=0.7), 3),
                    starts)
    observed = np.array([sum(row.tolist() == text for row in other) for text in texts])
    assert chi_squared_p(observed, count * np.array(chances)) < 1e-6


def test_the_head_in_numpy_is_that_of_torch(model):
    """Token by token, also where it drafts fewer ids than there are."""
    model.draft.drafted = 6
    head, hidden = DraftHead(head_parts(model.draft)), torch.randn(2, 32)
    tokens = torch.tensor([[4, 5, 3], [6, 6, 0]])
    with torch.no_grad():
        state, own = model.draft.start(hidden), head.start(hidden.numpy())
        for step in tokens.T:
            state = model.draft.after(state, step)
            own, logits = head.after(own, step.numpy())
            np.testing.assert_allclose(own, state.numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(logits[:, EOS:6], model.draft.logits(state)[:, EOS:],
                                       rtol=1e-4, atol=1e-5)
            assert (logits[:, [0, 1, 2, 6]] == -np.inf).all()
            told = head.told(step.numpy())
            np.testing.assert_allclose(told[:, :6], model.draft.told(step), rtol=1e-4, atol=1e-5)
            assert not told[:, 6].any()


def test_it_starts_as_the_vocabulary_head():
    """Of full rank it is the network's own head; of a lower one the best approximation."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(40, 8), torch.randn(3, 8)
    for rank, near in ((8, 1e-4), (12, 1e-4), (4, None)):
        vocabulary = Linear(8, 40)
        vocabulary.weight.data.copy_(weight)
        head = TorchHead(torch.nn.Embedding(40, 8), vocabulary, rank)
        head.start_from_vocabulary()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        best = hidden @ ((u[:, :rank] * s[:rank]) @ v[:rank]).T
        with torch.no_grad():
            found = head.logits(head.start(hidden))
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)
        if near:
            torch.testing.assert_close(found, hidden @ weight.T, rtol=1e-3, atol=1e-3)


def test_what_it_learns_from(model):
    kind = DraftTraining(4)
    rows = torch.tensor([[BOS, 4, 5, 6, 4, 4, EOS, PAD], [5, 6, 4, 5, 6, 5, 4, 6]])
    batch = kind.corrupt_batch(rows)
    # the first token of a block is known, and what stands behind [EOS] is not drafted
    assert batch.masked.tolist() == [[False, True, True, True, False, True, True, False],
                                     [False, True, True, True] * 2]
    assert (batch.noisy[:, ::4] == rows[:, ::4]).all() and (batch.noisy[:, 1:4] == MASK).all()
    # the head goes on from every token of the text
    assert (batch.next_weight > 0).tolist() == [[True] * 6 + [False] * 2, [True] * 8]
    alive = [starts.sum(1).tolist() for starts in chain(rows, batch.next_weight > 0)]
    assert alive == [[6, 7], [5, 6], [4, 5], [3, 4]]
    assert batch.weight.max().item() == pytest.approx(1 / (11 + 40))


def test_the_loss_by_hand(model, monkeypatch):
    """Cross-entropies with the causal mode's distribution, one draft after the other."""
    kind = DraftTraining(4)
    rows = torch.tensor([[BOS, 4, 5, 6, 4, 4, EOS, PAD], [5, 6, 4, 5, 6, 5, 4, 6]])
    batch, nats, stand = kind.corrupt_batch(rows), [], []
    model.draft.behind.weight.data.mul_(0.2)  # no q of less than 1e-30
    reader = CachedModel(model, Sampler())
    head = reader.draft_head

    def compare(clean: list[int], logits: np.ndarray) -> None:
        """With what follows these tokens."""
        reader.begin(np.arange(1))
        p, q = (torch.from_numpy(x).softmax(-1) for x in (
            reader.read(np.array([[PAD, *clean]]), logits=1)[0, 0], logits[0]))
        nats.append(-(p * q.clamp(min=1e-30).log()).sum().item())
        stand.append(torch.minimum(p, q).sum().item())

    for row in rows.tolist():
        text = row[:row.index(EOS)] if EOS in row else row
        wanted = text + [EOS] * (EOS in row)
        for place in range(1, len(wanted)):
            if place % 4:
                first = place // 4 * 4
                reader.begin(np.arange(1))
                reader.read(np.array([[PAD, *row[:first]]]))
                looked = reader.look(np.array([[row[first], MASK, MASK, MASK]]),
                                     np.array([place - first]))[:, 0]
                known = place - first == 1  # the network has seen the token before
                compare(row[:place], looked + (0 if known else head.told(
                    np.array([row[place - 1]]))))
        for start in range(len(text)):
            reader.begin(np.arange(1))
            reader.read(np.array([[PAD, *row[:start]]]))
            state = head.start(reader.hidden(np.array([start])))
            for place in range(start, min(start + CHAIN, len(wanted) - 1)):
                state, logits = head.after(state, np.array([row[place]]))
                compare(row[:place + 1], logits)
    loss = kind.loss(model, batch)
    assert loss.item() == pytest.approx(np.mean(nats), rel=1e-4)
    loss.backward()
    assert all((p.grad is not None) == name.startswith("draft.")
               for name, p in model.named_parameters())
    bound = kind.nelbo(model, [rows.numpy()])
    assert bound.nats.sum() == pytest.approx(sum(nats), rel=1e-4)
    assert bound.correct.sum() == pytest.approx(sum(stand), rel=1e-4)
    gradient = model.draft.mix.weight.grad.clone()
    monkeypatch.setattr(drafts, "PLACES", 8)  # a row at a time
    whole = kind.corrupt_batch(rows)
    for each in ([whole], [whole[:1], whole[1:]]):  # and a micro-batch at a time
        model.zero_grad()
        shares = [kind.loss(model, part) for part in each]
        assert sum(shares).item() == pytest.approx(loss.item(), rel=1e-5)
        sum(shares).backward()
        torch.testing.assert_close(model.draft.mix.weight.grad, gradient)
    parts = kind.nelbo(model, [rows.numpy()])
    assert parts.row.tolist() == [0, 1] and parts.nats == pytest.approx(bound.nats, rel=1e-5)


@pytest.fixture(scope="module")
def headless(joint_checkpoint, tmp_path_factory):
    """The joint checkpoint as one that has never drafted."""
    source = load_checkpoint(joint_checkpoint, "joint")
    source["weights"] = {name: weight for name, weight in source["weights"].items()
                         if not name.startswith("draft.")}
    source["model_config"]["draft_rank"] = 0
    path = tmp_path_factory.mktemp("drafts") / "headless.pt"
    torch.save(source, path)
    return path


@pytest.fixture(scope="module")
def trained(headless, long_data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_CONFIGS, "tiny", SMALL)
        train.main([*map(str, (
            "--objective", "draft", "--init_from", headless, "--checkpoint_dir", folder / "run",
            "--data_dir", long_data_dir, "--draft_rank", 8, "--draft_size", 4, "--max_steps", 30,
            "--batch_tokens", 1024, "--lr", 0.05,
            "--valid_rows", 16, "--num_samples", 1, "--device", "cpu", "--precision", "fp32"))])
    return folder / "run"


def test_training_changes_the_head_alone(trained, headless, capsys):
    before, after = (load_checkpoint(path, "joint")["weights"]
                     for path in (headless, trained / "final.pt"))
    assert set(after) - set(before) == {f"draft.{name}" for name in (
        "before.weight", "behind.weight", "read.weight", "mix.weight", "back.weight",
        "tell.weight")}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert after["draft.back.weight"].abs().max() > 0.01 < after["draft.tell.weight"].abs().max()
    checkpoint = load_checkpoint(trained / "best.pt", "joint")
    assert checkpoint["model_config"]["draft_rank"] == 8
    assert kind_of(checkpoint).modes == ("causal", "4", "16", "row")  # as it was trained for
    metrics = (trained / "metrics.jsonl").read_text()
    assert "valid_nelbo" in metrics
    generate.main(["--checkpoint", str(trained / "best.pt"), "--verify", "--num_samples", "1"])
    assert "tokens a round" in capsys.readouterr().out


def test_a_head_with_tables_of_its_own_is_to_be_trained_again(joint_checkpoint, tmp_path, fails,
                                                              capsys):
    """As it was once written; the model without it stays of use, but for a training of it."""
    source = load_checkpoint(joint_checkpoint, "joint")
    for name in ("before", "behind"):
        width = source["weights"].pop(f"draft.{name}.weight").shape[0]
        source["weights"][f"draft.{name}"] = torch.zeros(50, width)
    torch.save(source, tmp_path / "older.pt")
    generate.main(["--checkpoint", str(tmp_path / "older.pt"), "--num_samples", "1"])
    shown = capsys.readouterr()
    assert "older form and is left out" in shown.err and "--objective draft" in shown.err
    assert "tokens a round" not in shown.out
    (tmp_path / "run").mkdir()
    torch.save(source | {"optimizer": [], "train_config": source["train_config"] | {
        "objective": "draft"}}, tmp_path / "run/last.pt")
    assert "cannot be trained on" in fails(train.main, "--resume", "--checkpoint_dir",
                                           tmp_path / "run")


def test_it_resumes(trained, capsys, fails):
    error = fails(train.main, "--resume", "--checkpoint_dir", trained, "--draft_rank", 4)
    assert "--draft_rank 4" in error and "cannot change" in error
    train.main(["--resume", "--checkpoint_dir", str(trained), "--max_steps", "31"])
    assert load_checkpoint(trained / "last.pt", None)["step"] == 31
    text = capsys.readouterr().out
    assert "draft loss" in text and "bits/byte" not in text  # which is no likelihood of a text


def test_its_modes_are_those_of_the_model_without(trained, headless):
    rows = np.array([[BOS, 20, 30, 40, 50, EOS]])
    bounds = []
    for path in (headless, trained / "best.pt"):
        model = model_from_checkpoint(load_checkpoint(path, "joint"))
        batch = NextTokens(*(torch.from_numpy(rows) for _ in range(2)),
                           torch.from_numpy(rows > BOS), torch.ones(1, 6), torch.ones(1))
        with torch.no_grad():
            bounds.append(batch.hidden(model))
    assert torch.equal(*bounds)


@pytest.mark.parametrize("argv, words", [
    ([], "--init_from"), (["--draft_rank", "0"], "--draft_rank 0"),
    (["--draft_size", "1"], "--draft_size 1"), (["--block_sizes", "4"], "--block_sizes"),
    (["--dropout", "0.1"], "--dropout"), (["--model_config", "tiny"], "--model_config"),
    (["--fsdp"], "--fsdp")])
def test_what_is_refused(joint_checkpoint, long_data_dir, tmp_path, fails, argv, words):
    given = ["--init_from", joint_checkpoint] if argv else []
    assert words in fails(train.main, "--objective", "draft", *given, "--data_dir", long_data_dir,
                          "--checkpoint_dir", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def test_only_a_joint_model_drafts(checkpoint, headless, long_data_dir, tmp_path, fails):
    """What starts from another model is refused where its settings, of which the weights say
    nothing, are other ones."""
    run = ("--data_dir", long_data_dir, "--checkpoint_dir", tmp_path / "run")
    error = fails(train.main, "--objective", "draft", "--init_from", checkpoint, *run)
    assert "joint model" in error
    error = fails(train.main, "--objective", "joint", "--init_from", headless, "--model_config",
                  "tiny", "--no-qk_norm", *run)
    assert "other settings (qk_norm)" in error


def test_rows_keep_their_numbers(model):
    """As several processes need it: each measures some rows of all."""
    rows = np.array([[BOS, 4, 5, 6, 4, 5], [BOS, 6, 6, 4, 5, 4]])
    kind = DraftTraining(3)
    bound = kind.nelbo(model, [rows[:1], rows[1:]], numbers=[np.array([7]), np.array([3])])
    assert bound.row.tolist() == [7, 3] and not model.training


def test_the_flags_of_drafts_are_for_drafts(long_data_dir, tmp_path, fails):
    error = fails(train.main, "--draft_rank", 8, "--data_dir", long_data_dir, "--checkpoint_dir",
                  tmp_path / "run")
    assert "--draft_rank: for --objective draft alone" in error


def test_a_head_of_another_size_is_not_taken_for_it(trained, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pt", "joint")
    model = model_from_checkpoint(checkpoint)
    model.config = dataclasses.replace(model.config, draft_rank=9)
    save_checkpoint(tmp_path / "x.pt", model, checkpoint["tokenizer"],
                    checkpoint["length_histogram"], kind="joint")
    with pytest.raises(UserError, match="do not fit"):
        model_from_checkpoint(load_checkpoint(tmp_path / "x.pt", "joint"))
