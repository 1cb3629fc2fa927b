"""The joint model: its modes against enumeration, its writers, its cache, its training."""


import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_joint, chi_squared_p, stop_after
from test_diffusion import transformed
from test_train import STATE, argv, lines, same
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import evaluate
import train
import train_long
from block_diffusion import (
    CAUSAL,
    ROW,
    Blocks,
    JointDiffusion,
    causal_pass,
    mask_range,
    noisy_blocks,
    read_sizes,
)
from corpus.rows import TokenRows
from corpus.tokens import BOS, EOS, MASK, PAD, pad_rows
from diffusion import DiscreteDiffusion
from kinds.autoregressive import before_each
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.registry import kind_of
from model import DiffusionTransformer
from network.attention import HIDDEN, Cache
from network.draft_head import DraftHead as TorchHead
from network.layers import ModelConfig
from sampling import left_to_right
from sampling.cached import CachedModel, head_parts
from sampling.draft_head import DraftHead
from sampling.drawing import distribution, draw, verify
from sampling.left_to_right import (
    Piece,
    rows_of,
    up_to_the_end,
    write_blocks,
    write_causal,
    write_verified,
)
from sampling.sampler import Sampler
from sampling.step import draw as torch_draw
from training.config import TrainConfig
from training.trainer import Trainer

LETTERS = (4, 5, 6)
LONGEST = 5  # [BOS] and four places: 121 texts


def made(seed: int = 0, std: float = 0.3, **changes) -> DiffusionTransformer:
    """A toy with random weights over three letters."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(ModelConfig(**{**dict(
        width=32, heads=2, layers=2, vocab_size=7, max_len=16), **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


@pytest.fixture(scope="module")
def network() -> DiffusionTransformer:
    return made()


# ---- by hand -------------------------------------------------------------------------------------

@functools.cache
@torch.no_grad()
def by_hand(model: DiffusionTransformer, clean: tuple, block: tuple = (),
            ) -> tuple[np.ndarray, np.ndarray]:
    """Distributions (V,) of what follows the clean tokens, and (S, V) of what stands in the block
    behind them: by one pass over both, with all that is hidden written into its mask."""
    tokens = torch.tensor([[PAD, *clean, *block]])
    count, known = tokens.shape[1], 1 + len(clean)
    hidden = torch.ones(count, count).triu(1).bool()
    hidden[known:] = False  # a token of the block sees all of it, and everything before it
    view = model.view(torch.arange(count) - 1, torch.zeros(count, count).masked_fill(
        hidden, HIDDEN), causal=False)
    logits = model.hidden(tokens, view=view)[0].double() @ model.vocabulary.weight.double().T

    def among(scores: Tensor, ids: list[int]) -> np.ndarray:
        chances = torch.zeros(scores.shape, dtype=torch.float64)
        chances[..., ids] = scores[..., ids].softmax(-1)
        return chances.numpy()

    return (among(logits[known - 1], [*LETTERS, EOS]),
            among(logits[known:], [*LETTERS, EOS, PAD]))


def closed(block: tuple) -> tuple:
    """With [PAD] for what is hidden behind a visible end."""
    ends = [i for i, token in enumerate(block) if token in (EOS, PAD)]
    return block if not ends else (*block[:ends[0] + 1], *(
        PAD if token == MASK else token for token in block[ends[0] + 1:]))


def uncovered(model, clean: tuple, block: tuple) -> dict[tuple, float]:
    """The probability of every finished block, one token at a time in a random order."""
    done: dict[tuple, float] = {}
    states = {block: 1.0}
    while states:
        after: dict[tuple, float] = {}
        for state, weight in states.items():
            places = [i for i, token in enumerate(state) if token == MASK]
            chances = by_hand(model, clean, state)[1]
            for place, token in itertools.product(places, (*LETTERS, EOS, PAD)):
                new = closed((*state[:place], token, *state[place + 1:]))
                into = after if MASK in new else done
                into[new] = into.get(new, 0.0) + weight / len(places) * chances[place, token]
        states = after
    return done


def in_blocks_of(model, size: int, start: tuple = (BOS,)) -> dict[tuple, float]:
    """The probability of every row that is written in blocks."""
    rows: dict[tuple, float] = {}
    states = {start: 1.0}
    while states:
        after: dict[tuple, float] = {}
        for row, weight in states.items():
            done = len(row) // size * size
            hidden = min(size, LONGEST - done) - (len(row) - done)
            for block, p in uncovered(model, row[:done], (*row[done:], *[MASK] * hidden)).items():
                new = (*row[:done], *up_to_the_end(np.array(block)).tolist())
                into = rows if new[-1] == EOS or len(new) == LONGEST else after
                into[new] = into.get(new, 0.0) + weight * p
        states = after
    return rows


def left_to_right_of(model, sampler: Sampler | None = None, start: tuple = (BOS,),
                     ) -> dict[tuple, float]:
    """The probability of every row that is written token by token."""
    sampler = sampler or Sampler()
    if start[-1] == EOS or len(start) == LONGEST:
        return {start: 1.0}
    rows: dict[tuple, float] = {}
    chances = transformed(by_hand(model, start)[0], sampler)
    for token in (*LETTERS, EOS):
        if chances[token]:
            for row, p in left_to_right_of(model, sampler, (*start, token)).items():
                rows[row] = rows.get(row, 0.0) + chances[token] * p
    return rows


def fits(rows: list[np.ndarray], chances: dict[tuple, float]) -> float:
    """p-value of the rows, had they these chances."""
    seen = Counter(tuple(row.tolist()) for row in rows)
    assert seen.keys() <= chances.keys()
    return chi_squared_p(np.array([seen[row] for row in chances], float),
                         np.array(list(chances.values())) * len(rows))


def all_texts() -> list[list[int]]:
    """Every row that can be written: those that end, and those that are full."""
    return [[BOS, *letters, *[EOS] * (length + 1 < LONGEST)]
            for length in range(LONGEST) for letters in itertools.product(LETTERS, repeat=length)]


# ---- likelihood, against enumeration -------------------------------------------------------------

def nats(model, mode: str, rows: list[list[int]], **settings) -> np.ndarray:
    """Those of every row, the mean over its draws."""
    bound = JointDiffusion().in_mode(mode).nelbo(model, [pad_rows(rows)], **settings)
    assert np.array_equal(bound.k, bound.n)  # so that row_nats has no other factor
    return bound.nats.reshape(-1, len(rows)).mean(0)


def test_the_exact_modes_are_the_chain_rule(network):
    texts = all_texts()
    causal, single = [], []
    for row in texts:
        steps = [(tuple(row[:i]), token) for i, token in enumerate(row) if i]
        causal.append(-sum(math.log(by_hand(network, before)[0][token]) for before, token in steps))
        single.append(-sum(math.log(by_hand(network, before, (MASK,))[1][0, token])
                           for before, token in steps))
    assert nats(network, CAUSAL, texts) == pytest.approx(causal, rel=1e-5)
    for draws in (1, 3):
        assert nats(network, "1", texts, draws=draws) == pytest.approx(single, rel=1e-5)
    assert JointDiffusion().in_mode("1").exact and not JointDiffusion().in_mode("2").exact


def test_probabilities_of_all_texts_add_up_to_one(network):
    texts = all_texts()
    assert np.exp(-nats(network, CAUSAL, texts)).sum() == pytest.approx(1, abs=1e-5)
    # in a block of one, [PAD] can be drawn for [EOS]: it stands for the same end
    ends = sum(chances for row, chances in in_blocks_of(network, 1).items())
    assert ends == pytest.approx(1, abs=1e-9)
    drawn = {row: p for row, p in in_blocks_of(network, 1).items() if row[-1] != EOS}
    full = [list(row) for row in drawn]
    assert np.exp(-nats(network, "1", full)) == pytest.approx(list(drawn.values()), rel=1e-4)


def test_the_tokens_of_a_block_add_up_to_one(network):
    """Uncovered in any order, [PAD] for certain behind an end: nothing is lost and nothing twice.
    """
    for order in itertools.permutations(range(3)):
        total = 0.0
        for text in itertools.product((*LETTERS, EOS), repeat=3):
            if EOS in text[:-1]:
                if any(token != EOS for token in text[text.index(EOS):]):
                    continue
                text = (*text[:text.index(EOS) + 1], *[PAD] * (2 - text.index(EOS)))
            block = torch.tensor([[BOS, 5, 4, *text]])
            p = 1.0
            for k in range(3):
                masked = torch.zeros(1, 2, 3, dtype=torch.bool)
                masked[0, 1, list(order[k:])] = True
                noisy, wanted, _ = noisy_blocks(block, masked)
                if wanted[0, 3 + order[k]]:
                    chances = by_hand(network, (BOS, 5, 4), tuple(noisy[0, 3:].tolist()))[1]
                    p *= chances[order[k], text[order[k]]]
            total += p
        missing = sum(p for block, p in uncovered_in(network, (BOS, 5, 4), order).items()
                      if not is_text(block))
        assert 0 < missing and total + missing == pytest.approx(1, abs=1e-9)


def uncovered_in(model, clean: tuple, order: tuple) -> dict[tuple, float]:
    """The probability of every finished block of three, uncovered in this order."""
    states = {(MASK,) * 3: 1.0}
    for place in order:
        after: dict[tuple, float] = {}
        for state, weight in states.items():
            chances = by_hand(model, clean, state)[1] if state[place] == MASK else None
            for token in (*LETTERS, EOS, PAD) if chances is not None else (state[place],):
                new = closed((*state[:place], token, *state[place + 1:]))
                after[new] = after.get(new, 0.0) + weight * (
                    1.0 if chances is None else chances[place, token])
        states = after
    return states


def is_text(block: tuple) -> bool:
    """Whether [EOS], if there is any end, stands before [PAD] alone."""
    ends = [i for i, token in enumerate(block) if token in (EOS, PAD)]
    return not ends or block[ends[0]] == EOS and all(t == PAD for t in block[ends[0] + 1:])


def test_the_row_mode_is_the_bound_of_diffusion(network):
    rows = [pad_rows([[BOS, 4, 5, EOS], [BOS, 6, 6, 4, EOS]]), pad_rows([[4, 5, 6, 4]])]
    plain, joint = (kind.nelbo(network, rows, seed=3, draws=4)
                    for kind in (DiscreteDiffusion(), JointDiffusion()))
    for name in ("row", "n", "k", "nats", "correct"):
        assert np.array_equal(getattr(plain, name), getattr(joint, name))


def enumerated_bound(model, row: list[int], size: int) -> float:
    """Mean over the orders of all places of a block, of the sum of -log p, block after block."""
    total = 0.0
    for start in range(0, len(row), size):
        block = row[start:start + size]
        if EOS in block:
            block = [*block, *[PAD] * (size - len(block))]
        places = [i for i, token in enumerate(block) if token != BOS]
        orders = list(itertools.permutations(places))
        for order in orders:
            state = [MASK if i in places else token for i, token in enumerate(block)]
            for place in order:
                chances = by_hand(model, tuple(row[:start]), closed(tuple(state)))[1]
                if closed(tuple(state))[place] == MASK:  # else it is [PAD] for certain
                    total -= math.log(chances[place, block[place]]) / len(orders)
                state[place] = block[place]
    return total


@pytest.mark.parametrize("size", [2, 3])
def test_the_bound_of_blocks_is_the_mean_over_orders(network, size):
    rows = [[BOS, 4, 5, EOS], [BOS, EOS], [BOS, 6, EOS], [BOS, 5, 5, 6, 4], [BOS, 4, 6, 6, EOS]]
    expected = [enumerated_bound(network, row, size) for row in rows]
    draws = 1500
    kind = JointDiffusion().in_mode(str(size))
    bound = kind.nelbo(network, [pad_rows(rows)], seed=1, draws=draws)
    estimates = bound.nats.reshape(draws, len(rows))  # of every draw; k is n: no other factor
    assert np.array_equal(bound.k, bound.n)
    error = estimates.std(0) / draws ** 0.5
    assert (error < 0.03 * np.array(expected)).all()
    assert (np.abs(estimates.mean(0) - expected) < 4 * error + 1e-6).all()


def test_masks_of_blocks_belong_to_the_row(network):
    rows = pad_rows([[BOS, 4, 5, EOS], [BOS, 6, 6, 4, EOS], [BOS, 5, EOS]])
    kind = JointDiffusion().in_mode("2")
    whole = kind.nelbo(network, [rows], draws=3).row_nats()[0]
    some = kind.nelbo(network, [rows[[2, 1]]], draws=3, numbers=[np.array([2, 1])]).row_nats()[0]
    assert some == pytest.approx(whole[[1, 2]], rel=1e-5)
    assert not np.allclose(kind.nelbo(network, [rows], draws=3, seed=1).row_nats()[0], whole)


def test_what_lengths_cost(network):
    """Where [EOS] is predicted the length of a whole story is not paid for again."""
    histogram = {"story": {"5": 3, "6": 1}, "start": {"8": 2}, "middle": {}, "end": {"4": 2}}
    meta, row = {"length_histogram": histogram, "seq_len": 8}, [np.array([BOS, 4, 5, 6, EOS])]
    whole, *others = (JointDiffusion().in_mode(mode).extra_nats(meta, row)
                      for mode in (ROW, CAUSAL, "4"))
    assert whole == DiscreteDiffusion().extra_nats(meta, row) > others[0] == others[1] > 0


# ---- writers, against enumeration ----------------------------------------------------------------

def starts_of(count: int) -> list[np.ndarray]:
    return [np.array([BOS])] * count


@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocks_follow_their_distribution(network, size):
    sampler = Sampler(steps=size, pace="linear")
    starts = starts_of(4000)
    rows = rows_of(write_blocks(CachedModel(network, sampler), starts, sampler, size, LONGEST, 5),
                   starts)
    assert fits(rows, in_blocks_of(network, size)) > 0.001
    other = in_blocks_of(network, 3 if size != 3 else 2)
    assert fits(rows, other) < 1e-6  # they do differ


def test_a_prompt_is_kept(network):
    sampler = Sampler(steps=3, pace="linear")
    starts = [np.array([BOS, 6])] * 3000
    for writer, chances in (
            (write_blocks(CachedModel(network, sampler), starts, sampler, 3, LONGEST, 2),
             in_blocks_of(network, 3, (BOS, 6))),
            (write_causal(CachedModel(network, sampler), starts, sampler, LONGEST, 2),
             left_to_right_of(network, start=(BOS, 6)))):
        assert fits(rows_of(writer, starts), chances) > 0.001


class Opposite(CachedModel):
    """Likes best what the model likes least."""

    def look(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        logits = super().look(tokens, places)
        return np.where(np.isfinite(logits), -3 * logits, -np.inf).astype(np.float32)


DRAFTERS = {"itself": lambda model, sampler: None,
            "another": lambda model, sampler: CachedModel(made(7, std=0.5), sampler),
            "opposite": Opposite, "head": lambda model, sampler: None}


def lying_head(model) -> DraftHead:
    """Which says much, and nothing true."""
    torch.manual_seed(3)
    head = TorchHead(model.embedding, model.vocabulary, 4)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    head.drafted = 6  # one letter is never drafted
    return DraftHead(head_parts(head))


def verified(model, sampler: Sampler, size: int, drafter: str, starts: list[np.ndarray],
             seed: int = 0, longest: int = LONGEST, **more) -> Iterator[Piece]:
    reader = CachedModel(model, sampler)
    if drafter == "head":
        reader.draft_head, sampler = lying_head(model), replace(sampler, steps=0)
    return write_verified(reader, DRAFTERS[drafter](model, sampler) or reader, starts, sampler,
                          size, longest, seed, **more)


@pytest.mark.parametrize("drafter, size, options", [
    ("itself", 2, dict(steps=1)), ("itself", 4, dict(steps=2)),
    ("itself", 3, dict(steps=1, temperature=0.7)), ("another", 3, dict(steps=2)),
    ("another", 4, dict(steps=1, top_k=2)), ("opposite", 2, dict(steps=1, top_p=0.8)),
    ("head", 2, dict()), ("head", 4, dict(temperature=0.7)), ("head", 3, dict(top_p=0.8)),
    ("opposite", 4, dict(steps=2)), ("opposite", 3, dict(steps=2, temperature=0.7, top_k=3,
                                                         top_p=0.8))])
def test_drafts_are_verified_exactly(network, drafter, size, options):
    sampler, starts = Sampler(**options), starts_of(3000)
    rows = rows_of(verified(network, sampler, size, drafter, starts, seed=4), starts)
    assert fits(rows, left_to_right_of(network, sampler)) > 0.001


def test_a_wrong_verifier_would_be_noticed(network, monkeypatch):
    chances, starts = left_to_right_of(network), starts_of(3000)
    right = left_to_right.verify

    def without_what_is_above(draft, q, p, uniform):
        """Draws from p itself in the place of what fell."""
        count, token = right(draft, q, p, uniform)
        return count, token if token is None else int(
            draw(p[count:count + 1], uniform[1, count:count + 1])[0])
    for wrong, drafter in ((lambda draft, q, p, uniform: (len(draft), None), "itself"),
                           (without_what_is_above, "another"),
                           (without_what_is_above, "head")):
        monkeypatch.setattr(left_to_right, "verify", wrong)
        rows = rows_of(verified(network, Sampler(steps=1), 4, drafter, starts), starts)
        assert fits(rows, chances) < 1e-6


def test_greedy_writers_agree(network):
    sampler, starts = Sampler(steps=2, temperature=0.0), starts_of(2)
    rows = rows_of(write_causal(CachedModel(network, sampler), starts, sampler, LONGEST), starts)
    expected = [BOS]
    while expected[-1] != EOS and len(expected) < LONGEST:
        expected.append(int(by_hand(network, tuple(expected))[0].argmax()))
    for drafter in DRAFTERS:
        again = rows_of(verified(network, sampler, 3, drafter, starts), starts)
        assert [row.tolist() for row in (*rows, *again)] == [expected] * 4


@pytest.mark.parametrize("longest", [1, 20, 60])
def test_the_hidden_states_are_those_of_the_tokens_read_last(longest):
    """Also of rows of different lengths, and where the window has slid."""
    model, rng = made(0, max_len=16), np.random.default_rng(0)
    rows = np.concatenate([[[PAD]] * 2, rng.integers(4, 7, (2, longest + 2))], 1)
    reader = CachedModel(model, Sampler())
    reader.begin(np.arange(2))
    for start in range(0, longest, 5):
        reader.read(rows[:, start:start + 5])
    reader.forget(np.array([longest, max(1, longest - 3)]))
    logits = reader.read(rows[:, longest:longest + 3], logits=3)
    found = reader.hidden(np.array([0, 2]))
    assert found.shape == (2, 32)
    with torch.no_grad():
        again = model.head(torch.from_numpy(found), (EOS,)).numpy()
    np.testing.assert_allclose(again, logits[[0, 1], [0, 2]], rtol=1e-5)


def test_a_good_draft_saves_evaluations():
    """A drafter that is the verifier itself is never refused."""
    class Sure(CachedModel):
        def look(self, tokens, places):
            cache, = self.caches
            logits = self.read(tokens, logits=tokens.shape[1])[:, places - 1]
            cache.keep_tokens(cache.length - tokens.shape[1])
            return logits
    network = made(2)  # whose likeliest row is full
    sampler, starts = Sampler(steps=1, temperature=0.0), starts_of(1)
    drafter = Sure(network, sampler)
    pieces = list(write_verified(CachedModel(network, sampler), drafter, starts, sampler, 2,
                                 LONGEST))
    causal = list(write_causal(CachedModel(network, sampler), starts, sampler, LONGEST))
    assert len(causal) > len(pieces)
    # the draft, its verification, and the drafter's own reading of what stands
    assert all(piece.evaluations == 3 for piece in pieces)
    alone = list(verified(network, sampler, 2, "itself", starts))
    assert all(piece.evaluations == 2 for piece in alone)
    assert [len(piece.tokens) for piece in pieces[:-1]] == [2] * (len(pieces) - 1)


# ---- drawing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.7), dict(temperature=0.0), dict(top_k=2), dict(top_p=0.8),
    dict(temperature=1.4, top_k=3, top_p=0.6), dict(top_k=99), dict(temperature=1e-3)])
def test_distributions_and_draws_are_those_of_the_step(options):
    sampler = Sampler(**options)
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(400, 7, generator=generator)
    logits[:, :3] = -torch.inf
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    p = distribution(logits.numpy(), sampler)
    assert p.dtype == np.float64 and p.sum(-1) == pytest.approx(np.ones(400))
    expected = torch_draw(logits, uniform, torch.tensor(sampler.temperature), sampler.top_k,
                          sampler.top_p)
    assert np.array_equal(draw(p, uniform.numpy()), expected.numpy())
    if 0 < sampler.temperature and sampler.temperature > 0.1:
        raw = logits.double().softmax(-1).numpy()
        assert p == pytest.approx(transformed(raw, sampler), abs=1e-5)


def test_draws_stay_among_what_is_possible():
    p = np.array([[0.0, 0.25, 0.75, 0.0]])
    assert [int(draw(p, np.array([u]))[0]) for u in (0.0, 0.2499, 0.25, 1 - 2 ** -53)] == [
        1, 1, 2, 2]
    assert draw(3 * p, np.array([0.2]))[0] == 1  # a share of the whole


def test_verification_by_its_formula():
    draft, q = np.array([1, 2]), np.array([[0.1, 0.9, 0.0], [0.2, 0.3, 0.5]])
    p = np.array([[0.4, 0.3, 0.3], [0.1, 0.1, 0.8]])
    # the first stands with 1/3, the second for certain
    assert verify(draft, q, p, np.array([[0.33, 0.999], [0.0, 0.0]])) == (2, None)
    # in its place what p has above q: 0.3 and 0.3 of tokens 0 and 2
    assert verify(draft, q, p, np.array([[0.34, 0.0], [0.49, 0.0]])) == (0, 0)
    assert verify(draft, q, p, np.array([[0.34, 0.0], [0.51, 0.0]])) == (0, 2)


# ---- the cache -----------------------------------------------------------------------------------

CLOSE = dict(rtol=1e-5, atol=1e-5)


def some_rows(count: int, length: int, seed: int = 0) -> Tensor:
    """[BOS] and letters; every second row ends before its end."""
    rows = torch.randint(4, 7, (count, length), generator=torch.Generator().manual_seed(seed))
    rows[:, 0] = BOS
    for i in range(1, count, 2):
        rows[i, length - i:] = PAD
        rows[i, length - i - 1] = EOS
    return rows


def all_hidden_once(rows: Tensor, size: int, seed: int = 0) -> Blocks:
    """Rows in blocks, with half of their tokens hidden, whose weights are all 1."""
    masked = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    blocks = torch.nn.functional.pad(masked, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))
    noisy, wanted, there = noisy_blocks(rows, blocks & (torch.nn.functional.pad(
        rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size)) >= EOS))
    count = torch.ones(len(rows))
    return Blocks(rows, noisy, wanted, wanted.float(), count, there=there,
                  size=torch.full((len(rows),), size), next_weight=(rows >= EOS).float())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("count", [1, 8])
@torch.no_grad()
def test_cached_equals_uncached(size, count):
    """Block after block behind the cache, with a prompt in the first: the logits of one pass over
    whole rows."""
    model = made(3, max_len=24)
    batch = all_hidden_once(some_rows(count, 24), size)
    (clean, *_, ends), (noisy, *_, block_ends) = batch.parts(model)
    whole = model.head(causal_pass(model, before_each(batch.tokens)), (EOS,))
    torch.testing.assert_close(model.head(clean, ends), whole[batch.next_weight > 0])
    reader = CachedModel(model, Sampler())
    reader.begin(np.arange(count))
    reader.read(np.full((count, 1), PAD))
    rows = torch.zeros(count, 24, 7)
    for start in range(0, 24, size):
        tokens = batch.tokens[:, start:start + size]
        hidden = reader.passes(batch.noisy[:, start:start + size], causal=False)[0]
        rows[:, start:start + size] = model.head(hidden, block_ends)
        read = reader.read(tokens.numpy(), logits=tokens.shape[1])
        torch.testing.assert_close(torch.from_numpy(read)[:, :-1],
                                   whole[:, start + 1:start + tokens.shape[1]], **CLOSE)
    torch.testing.assert_close(rows[batch.masked], model.head(noisy, block_ends), **CLOSE)


@torch.no_grad()
def test_looking_is_forgotten_and_gives_what_is_asked(network):
    reader = CachedModel(network, Sampler())
    reader.begin(np.arange(2))
    reader.read(np.array([[PAD, BOS], [PAD, BOS]]))
    block = np.array([[4, MASK, MASK], [6, MASK, MASK]])
    logits = reader.look(block, np.array([1, 2]))
    again = reader.look(block, np.array([2]))
    np.testing.assert_allclose(again, logits[:, 1:], rtol=1e-5, atol=1e-6)
    for line, row in zip(logits, block.tolist(), strict=True):
        expected = by_hand(network, (BOS,), tuple(row))[1][1:]  # over letters and both ends
        expected[:, PAD] = 0  # a draft cannot be [PAD]
        assert distribution(line, Sampler()) == pytest.approx(
            expected / expected.sum(-1, keepdims=True), abs=1e-5)
    assert [cache.length for cache in reader.caches] == [2]


def windowed(model, rows: Tensor, window: int | None = None, first: int = -1) -> Tensor:
    """(B, L, D) of one causal pass, each token seeing the `window` - 1 before it."""
    place = torch.arange(rows.shape[1])
    far = place[:, None] - place
    hidden = (far < 0) | (far >= (window or rows.shape[1]))
    return model.hidden(rows, view=model.view(place + first, torch.zeros(hidden.shape).masked_fill(
        hidden, HIDDEN), causal=False))


def read_on(model, cache: Cache, tokens: Tensor, causal: bool = True) -> Tensor:
    return model.hidden(tokens, view=model.view(tokens.shape[1], cache=cache, causal=causal))


@torch.no_grad()
def test_ragged_rows():
    """Rows of a batch may know different numbers of tokens, and leave."""
    model = made(2, max_len=40)
    rows = torch.randint(4, 7, (4, 30), generator=torch.Generator().manual_seed(0))
    cache = Cache(first=-1)
    read_on(model, cache, rows[:, :9])
    counts = torch.tensor([3, 9, 5, 1])
    cache.keep_tokens(counts)
    told = [rows[i, :count] for i, count in enumerate(counts)]
    for step, size in enumerate((4, 1, 6)):
        if step == 2:
            chosen = torch.tensor([True, False, True, True])
            cache.keep_rows(chosen)
            rows, told = rows[chosen], [told[i] for i in chosen.nonzero()[:, 0]]
        new = rows[:, 10 + 6 * step:10 + 6 * step + size]
        cache.looking = True  # changes nothing
        looked = read_on(model, cache, new, causal=False)
        cache.looking = False
        read = read_on(model, cache, new)
        for i, line in enumerate(told):
            told[i] = torch.cat([line, new[i]])
            alone = windowed(model, told[i][None])[0]
            torch.testing.assert_close(read[i], alone[-size:], **CLOSE)
            torch.testing.assert_close(looked[i, -1:], read[i, -1:], **CLOSE) if size == 1 else (
                torch.testing.assert_close(looked[i, -1:], alone_look(model, line, new[i]),
                                           **CLOSE))
    assert cache.length == max(map(len, told))
    cache.keep_tokens(torch.tensor([4, 4, 4]))  # alike again
    last = read_on(model, cache, rows[:, 20:22])
    for i, line in enumerate(told):
        whole = torch.cat([line[:4], rows[i, 20:22]])[None]
        torch.testing.assert_close(last[i], windowed(model, whole)[0, -2:], **CLOSE)


def alone_look(model, clean: Tensor, block: Tensor) -> Tensor:
    """(1, D) of the last token of a block behind clean tokens."""
    count, known = len(clean) + len(block), len(clean)
    hidden = torch.ones(count, count).triu(1).bool()
    hidden[known:] = False
    view = model.view(torch.arange(count) - 1, torch.zeros(count, count).masked_fill(
        hidden, HIDDEN), causal=False)
    return model.hidden(torch.cat([clean, block])[None], view=view)[0, -1:]


@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_the_window_slides(ragged):
    """Far beyond two windows, where what is left is moved to the first slots."""
    model, window = made(4, max_len=10), 7
    rows = torch.randint(4, 7, (3, 60), generator=torch.Generator().manual_seed(1))
    cache = Cache(first=-1, window=window)
    told = [torch.zeros(0, dtype=torch.int64) for _ in rows]
    moved = 0
    for step, size in enumerate([3, 1, 2, 5, 1, 4, 7, 1, 1, 9, 2]):
        start = sum(map(len, told)) // 3 % 40
        new = rows[:, start:start + size]
        read = read_on(model, cache, new)
        for i, line in enumerate(told):
            told[i] = torch.cat([line, new[i]])
            torch.testing.assert_close(read[i], windowed(
                model, told[i][None], window)[0, -size:], **CLOSE)
        moved += int(cache.dropped.max()) > 0
        if ragged and size > 2:
            keep = torch.tensor([len(line) for line in told]) - torch.tensor([0, 1, step % 3])
            cache.keep_tokens(keep)
            told = [line[:count] for line, count in zip(told, keep, strict=True)]
    assert moved > 3 and cache.slots <= 64 and cache.length == max(map(len, told))


@torch.no_grad()
def test_slots_grow():
    model, cache = made(5, max_len=200), Cache(first=-1)
    rows = torch.randint(4, 7, (2, 150), generator=torch.Generator().manual_seed(1))
    seen, slots = [], set()
    for part in rows.split([1, 60, 10, 60, 19], dim=1):
        seen.append(read_on(model, cache, part))
        slots.add(cache.slots)
    torch.testing.assert_close(torch.cat(seen, dim=1), windowed(model, rows), **CLOSE)
    assert len(slots) == 3 and max(slots) < 300


# ---- stories and their batch ---------------------------------------------------------------------

def writers(size: int = 4, longest: int = 24, **options) -> dict:
    sampler = Sampler(steps=2, **options)

    def of(write, *more):
        return lambda model, starts, seed, numbers: write(
            CachedModel(model, sampler), starts, sampler, *more, longest, seed, numbers)
    return {"causal": of(write_causal), "blocks": of(write_blocks, size),
            **{drafter: functools.partial(
                lambda drafter, model, starts, seed, numbers: verified(
                    model, sampler, size, drafter, starts, seed, longest, numbers=numbers),
                drafter) for drafter in DRAFTERS}}


def together(pieces: Iterator[Piece]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    ended = set()
    for piece in pieces:
        assert piece.row not in ended and len(piece.tokens) and piece.evaluations > 0
        rows.setdefault(piece.row, []).extend(piece.tokens.tolist())
        if piece.ended:
            ended.add(piece.row)
    assert ended == rows.keys()
    return rows


def even_ends() -> DiffusionTransformer:
    """A toy whose stories end now and then, at all lengths."""
    model = made(1, std=0.4, max_len=24)
    with torch.no_grad():
        model.vocabulary.weight[[PAD, EOS]] = 0.0
    return model


@pytest.mark.parametrize("name", writers())
@pytest.mark.parametrize("longest", [24, 61])
def test_a_story_does_not_depend_on_its_batch(name, longest):
    """Also not of rows that are longer than any in training, which the window slides over."""
    model = even_ends()
    write = writers(longest=longest)[name]
    starts = [np.array(start) for start in (
        [BOS], [BOS, 4], [BOS, 5, 6], [BOS], [BOS, 6], [BOS, 4], [BOS, 4])]
    numbers = [0, 1, 2, 3, 9, 7, 8]
    rows = together(write(model, starts, 3, numbers))
    lengths = {len(row) for row in rows.values()}
    assert len(lengths) > 2 and (longest == 24 or max(lengths) > 24)  # at different times
    for start, number in zip(starts, numbers, strict=True):
        assert together(write(model, [start], 3, [number])) == {number: rows[number]}
    half = together(write(model, starts[3:], 3, numbers[3:]))
    assert half == {number: rows[number] for number in numbers[3:]}
    assert rows[7] != rows[8] or rows[0] != rows[3]  # each has noise of its own
    assert together(write(model, starts, 2, numbers)) != rows
    for row in rows.values():
        assert min(row[:-1], default=4) > EOS and row[-1] >= EOS
        assert row[-1] == EOS or len(row) >= longest - 3


@pytest.mark.parametrize("options", [
    dict(), dict(order="confidence"), dict(pace="threshold", order="margin"), dict(temperature=0.5),
    dict(remask="remdm_rescale", eta=0.5), dict(remask="corrector", eta=0.5)])
def test_no_text_behind_the_end(options):
    model = even_ends()
    sampler, starts = Sampler(steps=4, **options), starts_of(150)
    shown = []
    rows = rows_of(write_blocks(CachedModel(model, sampler), starts, sampler, 8, 24, 3, shown=(
        lambda numbers, state: shown.append((len(numbers), state)))), starts)
    for row in rows:
        assert row[0] == BOS and (row[1:-1] > EOS).all() and row[-1] >= EOS
        assert row[-1] == EOS or len(row) == 24
    assert all(len(state.tokens) == count for count, state in shown)
    assert sum(row[-1] == EOS and len(row) % 8 > 1 for row in rows) > 5


def test_no_story_is_asked_for(network):
    reader = CachedModel(network, Sampler())
    assert not [*write_causal(reader, [], Sampler(), LONGEST),
                *write_blocks(reader, [], Sampler(), 2, LONGEST),
                *write_verified(reader, reader, [], Sampler(), 2, LONGEST),
                *write_verified(reader, reader, [], Sampler(steps=0), 2, LONGEST)]


def test_starts_of_different_blocks_are_refused(network):
    starts = [np.array([BOS]), np.array([BOS, 4])]
    with pytest.raises(ValueError, match="different blocks"):
        list(write_blocks(CachedModel(network, Sampler()), starts, Sampler(), 2, LONGEST))


def test_what_a_kind_writes(network):
    for mode in (CAUSAL, "1", "2", "3"):
        rows = JointDiffusion().in_mode(mode).write(network, [1] * 5, Sampler(steps=2), seed=1)
        assert len(rows) == 5 and all(2 <= len(row) <= 16 for row in rows)
    rows = JointDiffusion().write(network, [3, 2], Sampler(steps=2))
    plain = DiscreteDiffusion().write(network, [3, 2], Sampler(steps=2))
    assert all(map(np.array_equal, rows, plain)) and [len(row) for row in rows] == [5, 4]


# ---- training: what is hidden --------------------------------------------------------------------

def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [1, 3, 4, 16, 40])
def test_masks_of_training(size):
    kind, rows = JointDiffusion((size,)), some_rows(60, 48)
    batch = kind.corrupt_batch(rows, generator())
    width = batch.tokens.shape[1]
    assert width % size == 0 and torch.equal(batch.tokens[:, :48], rows)
    assert torch.equal(batch.noisy, batch.tokens.masked_fill(batch.masked, MASK))
    blocks, masked, noisy, there = (x.unflatten(1, (-1, size)) for x in (
        batch.tokens, batch.masked, batch.noisy, batch.there))
    ends = (blocks == EOS).any(-1)
    text = (blocks > EOS).any(-1)
    assert ends.any() and masked.any(-1)[text & ~ends].all()
    # [BOS] is given; [PAD] is hidden where an end in its block is, before it, and nowhere else
    assert not masked[blocks == BOS].any() and not masked[~ends & ~text].any()
    for block, hidden in zip(blocks[ends].tolist(), noisy[ends].tolist(), strict=True):
        end = block.index(EOS)
        first = min([i for i in range(end, size) if hidden[i] != MASK], default=size)
        assert MASK not in hidden[first:]
        assert block[end:] == [EOS, *[PAD] * (size - end - 1)]
    # what is no part of the row is not there: a row may end without [EOS]
    assert torch.equal(there, ends[..., None] | (blocks != PAD))
    assert (batch.weight[batch.masked] > 0).all() and not batch.weight[~batch.masked].any()


@pytest.mark.parametrize("size", [4, 16, 64])
def test_shares_of_a_block_lie_in_its_range(size):
    rows = torch.full((150, 64), 5)
    low, high = mask_range(size)
    assert (low, high) == {4: (0.45, 0.95), 16: (0.3, 0.8), 64: (0.0, 1.0)}[size]
    batches = [JointDiffusion((size,)).corrupt_batch(rows, generator(seed)) for seed in range(4)]
    shares = torch.cat([batch.masked.unflatten(1, (-1, size)).double().mean(-1).flatten()
                        for batch in batches])
    u = torch.linspace(low, high, 10_001, dtype=torch.float64)[1:]
    expected = (u / (1 - (1 - u) ** size)).mean()  # given that something is hidden
    assert abs(shares.mean() - expected) < 4 * shares.std() / len(shares) ** 0.5
    assert shares.min() > 0 and abs(expected - (low + high) / 2) < 0.04


def test_sizes_take_turns():
    kind = JointDiffusion(read_sizes("causal,4,4,row"), causal_share=0.3)
    assert kind.modes == (CAUSAL, "4", ROW)
    batch = kind.corrupt_batch(some_rows(42, 24), generator())
    counts = {size: int((batch.size == size).sum()) for size in (-1, 0, 4)}
    assert counts[4] in (20, 21, 22) and counts[-1] in (10, 11) and counts[0] in (10, 11)
    assert batch.size.tolist() != sorted(batch.size.tolist())
    other = kind.corrupt_batch(some_rows(42, 24), generator(1))
    assert not torch.equal(other.size, batch.size)
    # pass 1 over all but the whole rows, pass 2 over all but the causal ones
    assert not batch.masked[batch.size == -1].any() and batch.masked[batch.size == 0].any()
    assert not batch.next_weight[batch.size == 0].any()
    assert torch.equal(batch.next_weight[batch.size != 0] > 0, batch.tokens[batch.size != 0] >= EOS)
    assert batch.passes == pytest.approx((42 - counts[0] + 42 - counts[-1]) / 42)
    assert batch.predicted == int(batch.masked.sum() + (batch.next_weight > 0).sum())


def test_whole_rows_are_trained_between_the_times_asked_for_and_blocks_between_their_own():
    kind = JointDiffusion((0, 16), between=(0.1, 0.15))
    batch = kind.corrupt_batch(torch.full((40, 192), 9), generator())
    shares = batch.masked.float().mean(1)
    whole = batch.size == 0
    assert shares[whole].max() < 0.3 < 0.4 < shares[~whole].min()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_weights_and_parts_add_up(network, share):
    kind = JointDiffusion(read_sizes("3,causal,row,5"), share)
    batch = kind.corrupt_batch(some_rows(12, 15), generator())
    assert float(batch.next_weight.sum()) == pytest.approx(share)
    assert float(batch.weight.sum()) == pytest.approx(1 - share)
    whole = kind.loss(network, batch)
    parts = [kind.loss(network, batch[part]) for part in torch.arange(12).chunk(5)]
    torch.testing.assert_close(sum(parts), whole)
    # the two means, by their own batches
    log_p = [network.head(hidden, ends).log_softmax(-1).gather(1, targets[:, None])[:, 0]
             for hidden, targets, _, ends in batch.parts(network)]
    clean, noisy, rows = (-(weight * own).sum() for own, (_, _, weight, _) in zip(
        log_p, batch.parts(network), strict=True))
    torch.testing.assert_close(clean + noisy + rows, whole)
    assert (clean == 0) == (share == 0)


def test_blocks_may_go_beyond_the_longest_row(network):
    rows = some_rows(6, 16)  # as long as the network's rows may be
    batch = JointDiffusion((5, 0)).corrupt_batch(rows, generator())
    assert batch.tokens.shape == (6, 20) and (batch.tokens[:, 16:] == PAD).all()
    *_, (hidden, targets, _, _) = batch.parts(network)
    whole = batch.size == 0
    expected = network.hidden(batch.noisy[whole, :16])[batch.masked[whole, :16]]
    torch.testing.assert_close(hidden, expected)
    assert torch.equal(targets, rows[whole][batch.masked[whole, :16]])


def test_a_batch_with_nothing_to_hide(network):
    """All that was chosen may stand behind a visible end: no number breaks."""
    kind, row = JointDiffusion((8,), causal_share=0.0), torch.tensor([[BOS, 4, EOS]])
    seen = set()
    for seed in range(60):
        batch = kind.corrupt_batch(row, generator(seed))
        loss = kind.loss(network, batch)
        assert loss.isfinite()
        seen.add(bool(batch.masked.any()))
    assert seen == {True, False}


# ---- training: who sees what ---------------------------------------------------------------------

def everything(rows: Tensor, noisy: Tensor, sizes: list[int]) -> Blocks:
    """A batch whose every place is asked for."""
    everywhere = torch.ones(rows.shape, dtype=torch.bool)
    weight = everywhere.float()
    return Blocks(rows, noisy, everywhere, weight, torch.ones(len(rows)), there=everywhere,
                  size=torch.tensor(sizes), next_weight=weight)


@torch.no_grad()
def outcomes(model, batch: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (B, L, D) of the clean, the cut and the whole rows."""
    length = batch.tokens.shape[1]
    return tuple(hidden.unflatten(0, (-1, length)) for hidden, *_ in batch.parts(model))


def moved(a: Tensor, b: Tensor) -> list[int]:
    """The places of one row, (L, D) each, that differ."""
    return ((a - b).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()


def test_who_sees_what(network):
    """Rows of sizes 3, 4, none and the whole, of one batch."""
    sizes, length = [3, 0, 4, -1], 12
    rows = torch.randint(4, 7, (4, length), generator=generator())
    noisy = rows.masked_fill(torch.rand(4, length, generator=generator(1)) < 0.5, MASK)
    clean, cut, whole = outcomes(network, everything(rows, noisy, sizes))
    assert len(clean) == 3 and len(cut) == 2 and len(whole) == 1
    torch.testing.assert_close(whole[0], network.hidden(noisy[1:2])[0])  # the plain model
    torch.testing.assert_close(clean[2], windowed(network, before_each(rows[3:]))[0])
    for place in range(length):
        changed = noisy.clone()
        changed[:, place] = torch.where(noisy[:, place] == 5, 4, 5)
        other = outcomes(network, everything(rows, changed, sizes))
        for i, size in enumerate((3, 4)):  # the block, and nothing outside it
            start = place // size * size
            assert moved(cut[i], other[1][i]) == list(range(start, start + size))
        assert torch.equal(clean, other[0]) and len(moved(whole[0], other[2][0])) == length
        changed = rows.clone()
        changed[:, place] = torch.where(rows[:, place] == 5, 4, 5)
        other = outcomes(network, everything(changed, noisy, sizes))
        for i, size in enumerate((3, 4)):  # the blocks behind it
            assert moved(cut[i], other[1][i]) == list(range(place // size * size + size, length))
        for i in range(3):  # what follows it
            assert moved(clean[i], other[0][i]) == list(range(place + 1, length))
        assert torch.equal(whole, other[2])


def test_what_is_not_there_is_not_seen(network):
    rows = torch.tensor([[BOS, 4, 5, 6, 4, PAD]])  # goes on in another row
    batch = everything(rows, torch.tensor([[BOS, MASK, 5, MASK, MASK, PAD]]), [3])
    batch.there = rows != PAD
    short = everything(rows[:, :5], batch.noisy[:, :5], [3])
    torch.testing.assert_close(outcomes(network, batch)[1][:, :5], outcomes(network, short)[1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_equals_the_dense_mask():
    """More than one tile of 128 x 128, tiles that end early, places that are not there."""
    model, length = made(2, max_len=200), 150
    rows = torch.randint(4, 7, (4, length), generator=generator())
    noisy = rows.masked_fill(torch.rand(4, length, generator=generator(1)) < 0.5, MASK)
    batch = everything(rows, noisy, [3, 16, 64, 200])
    batch.there = torch.rand(4, length, generator=generator(2)) < 0.9
    dense = outcomes(model, batch)[1]
    batch.flex = True
    assert isinstance(batch.view(model).mask, BlockMask)
    torch.testing.assert_close(outcomes(model, batch)[1], dense, **CLOSE)
    batch.size = torch.tensor([3, 16, 64, 4])
    assert moved(outcomes(model, batch)[1][3], dense[3])  # it does look at the mask


def test_the_gradient_reaches_pass_1_through_its_keys():
    """The word 6 stands in the clean row alone, and the loss is that of the block behind it."""
    model = made(1, tied_head=False)
    rows = torch.tensor([[BOS, 6, 4, 5, 4, 5]])
    noisy = torch.tensor([[BOS, MASK, 4, MASK, 4, MASK]])
    batch = everything(rows, noisy, [3])
    batch.next_weight = torch.zeros(1, 6)
    for places, reached in (([3, 5], True), ([1], False)):
        batch.weight = torch.zeros(1, 6)
        batch.weight[0, places] = 1.0
        model.zero_grad()
        JointDiffusion((3,)).loss(model, batch).backward()
        assert bool(model.embedding.weight.grad[6].any()) == reached


def test_an_untrained_network_pays_for_every_token_alike():
    """Near log V a token, with [EOS] and [PAD] among them where they are predicted."""
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=400))
    rows = [torch.randint(4, 400, (4, 32), generator=generator()).numpy()]
    for mode, among in ((CAUSAL, 397), ("4", 398), ("16", 398), (ROW, 396)):
        bound = JointDiffusion().in_mode(mode).nelbo(model, rows, draws=2)
        assert bound.nats_per_token == pytest.approx(math.log(among), abs=0.03)


# ---- training: the command line ------------------------------------------------------------------

@pytest.fixture
def settings(long_data_dir, tmp_path) -> dict:
    return dict(objective="joint", block_sizes="3,16,row", data_dir=str(long_data_dir),
                checkpoint_dir=str(tmp_path / "joint"), model_config="tiny", max_steps=6,
                batch_tokens=1024, precision="fp32", device="cpu", valid_every=3, valid_rows=8,
                save_every=2, num_samples=1, sample_steps=4)


def test_it_trains_resumes_to_the_bit_and_keeps_its_kind(settings, tmp_path, capsys, fails):
    train.main(argv(settings))
    text = capsys.readouterr().out
    assert "(the mean of causal " in text and ", 3 " in text and ", row " in text
    assert text.count("  | ") == 2
    figures = lines(settings["checkpoint_dir"])[-1]
    each = [figures[f"valid_bits_per_byte_{mode}"] for mode in ("causal", "3", "16", "row")]
    assert len(set(each)) == 4
    assert figures["valid_bits_per_byte"] == pytest.approx(np.mean(each))
    stopped = {**settings, "checkpoint_dir": str(tmp_path / "stopped")}
    trainer = Trainer(TrainConfig(**stopped))
    stop_after(trainer, 4)
    train.main(["--checkpoint_dir", stopped["checkpoint_dir"], "--resume"])
    a, b = (load_checkpoint(f"{one['checkpoint_dir']}/last.pt", kind="joint")
            for one in (settings, stopped))
    for name in STATE:
        assert same(a[name], b[name]), name
    kind = kind_of(a)
    assert isinstance(kind, JointDiffusion) and kind.modes == ("causal", "3", "16", "row")
    assert isinstance(model_from_checkpoint(a), DiffusionTransformer)
    error = fails(train.main, "--resume", "--checkpoint_dir", settings["checkpoint_dir"],
                  "--objective", "elbo")
    assert "--objective" in error and "cannot change" in error


def test_it_learns(settings):
    trainer = Trainer(TrainConfig(**{**settings, "max_steps": 40, "valid_every": 40}))
    trainer.run()
    done = lines(settings["checkpoint_dir"])
    losses = [line["loss"] for line in done if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("which", ["plain", "twin"])
def test_it_starts_from_other_weights(settings, which, checkpoint, tmp_path):
    path = checkpoint
    if which == "twin":
        path = tmp_path / "twin" / "best.pt"
        Trainer(TrainConfig(**{**settings, "objective": "autoregressive", "max_steps": 3,
                               "checkpoint_dir": str(path.parent)})).run()
    trainer = Trainer(TrainConfig(**{**settings, "init_from": str(path)}))
    source = load_checkpoint(path, kind=None)
    assert trainer.network.model.config.causal is False
    for name, weight in trainer.network.model.state_dict().items():
        assert torch.equal(weight, source["ema"][name]), name
    trainer.run()
    train.main(["--checkpoint_dir", settings["checkpoint_dir"], "--resume", "--max_steps", "7"])
    last = load_checkpoint(Path(settings["checkpoint_dir"], "last.pt"), kind="joint")
    assert last["step"] == 7 and not same(last["weights"], source["ema"])


@pytest.mark.parametrize("changes, message", [
    (dict(block_sizes="4,none"), "--block_sizes 4,none: write numbers"),
    (dict(block_sizes="0"), "--block_sizes 0: write numbers"),
    (dict(block_sizes=""), "write numbers"), (dict(block_sizes="4,,row"), "write numbers"),
    (dict(block_sizes="2000"), "from 1 to 1024"), (dict(block_sizes="²"), "write numbers"),
    (dict(causal_share="1"), "--causal_share 1"),
    (dict(block_sizes="causal,4", t_min=0.2), "--t_min --t_max: times of whole rows"),
    (dict(objective="masked_ce"), "--block_sizes: for --objective joint alone"),
    (dict(objective="autoregressive", causal_share="0.2"),
     "--block_sizes --causal_share: for --objective joint alone"),
    (dict(schedule="cosine"), "--schedule: the joint model masks by its own table"),
    (dict(fsdp=True), "--fsdp: a row of the joint model takes one pass or two"),
    (dict(flex_attention=True), "--flex_attention: torch trains with it on a CUDA GPU alone"),
    (dict(init_from="nowhere.pt"), "no checkpoint nowhere.pt"),
    (dict(init_from="plain", model_config="micro"), "not of the size of --model_config micro"),
    (dict(init_from="conditional"), "has other parts"),
    (dict(block_sizes="row"), "--block_sizes row: whole rows alone"),
    (dict(init_from="plain", data_dir="other"), "another tokenizer")])
def test_bad_settings(settings, changes, message, checkpoint, conditional_checkpoint, data_dir,
                      fails):
    places = {"plain": checkpoint, "conditional": conditional_checkpoint, "other": data_dir}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    assert message in fails(train.main, *argv({**settings, **changes}))
    assert not Path(settings["checkpoint_dir"], "last.pt").exists()


# ---- measuring -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def joint_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """That of a toy which has learned as a plain model what it knows."""
    return as_joint(checkpoint, tmp_path_factory.mktemp("joint") / "best.pt")


@pytest.fixture
def evaluated(joint_checkpoint, tmp_path, capsys):
    def run(command: str, *words: object) -> tuple[dict, str]:
        target = tmp_path / "figures.json"
        evaluate.main([command, "--checkpoint", str(joint_checkpoint), "--output", str(target),
                       "--precision", "fp32", *map(str, words)])
        return json.loads(target.read_text()), capsys.readouterr().out
    return run


def test_the_likelihood_of_every_mode(evaluated, checkpoint, tmp_path):
    quick = ("--max_rows", 4, "--num_samples", 2, "--draws", 2, "--steps", 3)
    result, text = evaluated("likelihood", *quick)
    assert list(result["modes"]) == ["causal", "4", "row"] and "likelihood" not in result
    figures = {mode: entry["likelihood"]["bits_per_byte"]
               for mode, entry in result["modes"].items()}
    assert len(set(figures.values())) == 3
    for mode, value in figures.items():
        assert f"| {mode} | {value:.4f} ± " in text
        entry = result["modes"][mode]
        assert f"{mode}: {entry['protocol']}" in text and "4 rows of val" in entry["protocol"]
        assert ("curve" in entry) == (mode == "row")
        assert entry["diversity"]["data"] == result["modes"]["row"]["diversity"]["data"]
    for mode, words in (("causal", "exact likelihood, left to right"), ("4", "blocks of 4, any-"),
                        ("row", "any-order NELBO, mask count")):
        assert result["modes"][mode]["protocol"].startswith(words)
    assert "sin(pi t/2)^2" in text and "self_bleu" in text
    # the same network as a plain model
    evaluate.main(["--checkpoint", str(checkpoint), *map(str, quick), "--output",
                   str(tmp_path / "plain.json"), "--precision", "fp32"])
    plain = json.loads((tmp_path / "plain.json").read_text())
    row = result["modes"]["row"]
    for key in ("likelihood", "masked_ce", "curve", "averages_over_t", "diversity"):
        assert row[key] == plain[key]
    assert "modes" not in plain and plain["config"] == {
        **result["config"], "checkpoint": str(checkpoint), "output": str(tmp_path / "plain.json")}


def test_the_likelihood_of_some_modes(evaluated):
    result, _ = evaluated("likelihood", "--mode", 7, "causal", 7, "--max_rows", 3, "--num_samples",
                          0, "--draws", 1)
    assert list(result["modes"]) == ["7", "causal"]  # also one that it was not trained for
    assert all("diversity" not in entry for entry in result["modes"].values())


@pytest.mark.parametrize("words, message", [
    (["--mode", "0"], "--mode 0: choose causal, row or a block size"),
    (["--mode", "4", "best"], "--mode best"), (["--mode", "-3"], "--mode"),
    (["--mode", "causal", "1", "--draws", "2"], "--draws: without effect for an exact mode"),
    (["--mode", "causal", "--steps", "2"], "--steps: without effect for an exact mode")])
def test_bad_modes(joint_checkpoint, words, message, fails):
    assert message in fails(evaluate.main, "--checkpoint", joint_checkpoint, *words)


def test_only_some_kinds_have_modes(checkpoint, fails):
    assert "--mode row: for a joint model alone" in fails(
        evaluate.main, "--checkpoint", checkpoint, "--mode", "row")


def test_other_measurements_are_those_of_the_row(evaluated, checkpoint, tmp_path):
    plain = tmp_path / "plain.json"
    for command, words, key in (
            ("samplers", ["--num_samples", 2, "--evaluations", 2, "--samplers", "random"],
             "samplers"), ("infilling", ["--num_samples", 3, "--steps", 2, "--draws", 1,
                                         "--left_share", 0], "arms")):
        result, text = evaluated(command, *words)
        evaluate.main([command, "--checkpoint", str(checkpoint), "--output", str(plain),
                       "--precision", "fp32", *map(str, words)])
        one, other = result[key], json.loads(plain.read_text())[key]
        if key == "samplers":
            for line in (*one, *other):
                del line["seconds"], line["tokens_per_second"]
            assert one == other
        else:
            for key in ("bleu_interval", "bleu_p"):  # beside another arm alone
                del one["this model"][key]
            assert one["this model"] == other["this model"] and "rescored" in text


def test_a_gap_from_its_left_side_alone(joint_checkpoint, long_data_dir):
    checkpoint = load_checkpoint(joint_checkpoint, "joint")
    model, kind = model_from_checkpoint(checkpoint), kind_of(checkpoint).in_mode(CAUSAL)
    row = TokenRows(long_data_dir, "val")[0].astype(np.int64)
    gap, other = row.copy(), row.copy()
    gap[5:9] = MASK
    gap[12] = MASK
    other[9:12] = row[20:23]  # between the two
    before = torch.from_numpy(np.concatenate([[PAD], row[:-1]]))[None]
    view = model.view(torch.arange(len(row)) - 1, causal=True)
    with torch.no_grad():
        nats = -model.head(model.hidden(before, view=view))[0].log_softmax(-1)
    expected = sum(float(nats[i, row[i]]) for i in (5, 6, 7, 8, 12))
    assert kind.gap_nats(model, row, gap) == pytest.approx(expected, rel=1e-4)
    first, left = kind.in_mode(ROW), np.where(np.arange(len(row)) == 12, row, gap)
    changed = np.where(left == MASK, MASK, other)
    assert kind.gap_nats(model, other, changed) == kind.gap_nats(model, row, left)
    assert first.gap_nats(model, other, changed) != first.gap_nats(model, row, left)
    one, two = (kind.fill(model, [rows], Sampler(), seed=1)[0] for rows in (gap, left))
    assert (one != MASK).all() and (one > EOS)[[5, 6, 7, 8, 12]].all()
    assert np.array_equal(one[gap != MASK], row[gap != MASK])
    assert np.array_equal(one[:12], two[:12])  # each gap has its own place in the noise
    assert np.array_equal(kind.fill(model, [changed], Sampler(), seed=1)[0][5:9], two[5:9])


def test_a_joint_models_own_left_side_stands_in_for_a_twin(joint_checkpoint, long_data_dir,
                                                           tmp_path, capsys):
    target = tmp_path / "infilling.json"
    evaluate.main(["infilling", "--checkpoint", str(joint_checkpoint), "--data_dir",
                   str(long_data_dir), "--num_samples", "4", "--steps", "3", "--output",
                   str(target), "--precision", "fp32", "--draws", "1", "--candidates", "1"])
    result = json.loads(target.read_text())
    assert list(result["arms"]) == ["this model", "left to right", "rescored"]
    mine, other = (np.array(result["arms"][name]["story_nats"])
                   for name in ("this model", "left to right"))
    tokens = np.array(result["story_tokens"])
    assert result["difference"]["nats_per_token"] == pytest.approx(
        (mine - other).sum() / tokens.sum()) != 0
    assert "bound" not in result["arms"]["left to right"]
    assert "this model less left to right" in capsys.readouterr().out


def test_a_long_run(settings, tmp_path, capsys):
    folder = tmp_path / "long"
    corpus = tmp_path / "stories.txt"
    corpus.write_text("".join(f"Once a cat had {i} hats. It was happy.\n<|endoftext|>\n"
                              for i in range(200)))
    train_long.main(argv(dict(
        objective="joint", block_sizes="4,row", data_source=corpus, checkpoint_dir=folder,
        model_config="tiny", max_steps=4, batch_tokens=512, vocab_size=300, seq_len=64,
        device="cpu", precision="fp32", valid_rows=8, num_samples=0, draws=1, compared_stories=2,
        written_stories=2, written_steps=4)))
    report = (folder / "report.md").read_text()
    modes = json.loads((folder / "evaluation.json").read_text())["modes"]
    assert list(modes) == ["causal", "4", "row"]
    for mode, entry in modes.items():
        name = "NLL" if mode == "causal" else "NELBO"
        assert f"| {mode}: bits/byte | {entry['likelihood']['bits_per_byte']:.4f} ±" in report
        assert f"| {mode}: {name}, nats/token | " in report
        assert f"{mode}: {entry['protocol']}." in report
    evaluate.main(["curves", "--checkpoint_dir", str(folder)])
    evaluate.main(["curves", "--compare", str(folder), "--output", str(tmp_path / "all.png")])
    assert (tmp_path / "all.png").stat().st_size > 1000
