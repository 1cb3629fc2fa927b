from cli import UserError

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TableModel, all_rows, chi_squared_p
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
from corpus.tokens import BOS, EOS, MASK, PAD, pad_rows
from diffusion import SCHEDULES, DiscreteDiffusion
from kinds.likelihood import Nelbo
from sampling import step
from sampling.loop import unmask, unmask_rows
from sampling.paces import plan
from sampling.sampler import ADAPTIVE_PACES, ORDERS, PACES, REMASKS, Sampler
from sampling.step import (
    SCORES,
    UnmaskStep,
    draw,
    draw_exactly,
    keep_likeliest,
    numpy_choice,
    numpy_step,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- schedules and corruption --------------------------------------------------------------------

@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_rate_is_its_derivative(name):
    schedule = SCHEDULES[name]()
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    ratio = schedule.mask_ratio(t)
    (rate,) = torch.autograd.grad(ratio.sum(), t)
    torch.testing.assert_close(schedule.rate(t), rate)
    ends = schedule.mask_ratio(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="cosine or linear"):
        DiscreteDiffusion(schedule="square")
    with pytest.raises(UserError, match="masked_ce"):
        DiscreteDiffusion(objective="mse")


def test_times_are_stratified():
    times = DiscreteDiffusion().times(100, generator())
    assert (0 < times).all() and (times <= 1).all()
    assert sorted(np.ceil(times.numpy() * 100).astype(int)) == list(range(1, 101))
    assert not torch.equal(times, times.sort().values)


def test_training_batches_can_leave_out_times_at_both_ends():
    tokens = torch.full((400, 300), 9)
    batch = DiscreteDiffusion(between=(0.2, 0.7)).corrupt_batch(tokens, generator())
    times = np.sort(batch.mask_ratio.numpy())
    assert np.abs(times - np.linspace(0.2, 0.7, 401)[1:]).max() < 0.0015  # one in each interval
    shares = batch.masked.float().mean(1)
    assert (shares - batch.mask_ratio).abs().max() < 0.12
    assert shares.min() < 0.28 and shares.max() > 0.62
    with pytest.raises(UserError, match="--objective elbo: a bound is over all times"):
        DiscreteDiffusion(objective="elbo", between=(0.2, 0.7))


def test_corruption_hides_text_only_and_never_nothing():
    rows = pad_rows([[BOS, *[9] * n, EOS] for n in (1, 2, 5, 13)] * 500)
    tokens = torch.from_numpy(rows)
    for t in (1e-9, 1e-3, 0.3, 1.0):
        corrupted = DiscreteDiffusion().corrupt(
            tokens, torch.full((len(tokens),), t, dtype=torch.float64), generator())
        assert (corrupted.masked.sum(1) >= 1).all()
        assert (corrupted.noisy[corrupted.masked] == MASK).all()
        assert (tokens[corrupted.masked] == 9).all()
        assert torch.equal(corrupted.noisy[~corrupted.masked], tokens[~corrupted.masked])
        assert (corrupted.weight[~corrupted.masked] == 0).all()
        if t == 1.0:
            assert torch.equal(corrupted.masked, tokens == 9)


def test_masks_have_the_distribution_of_bernoulli_draws_given_one():
    n, t, count = 4, 0.3, 40_000
    tokens = torch.full((count, n), 9)
    masked = DiscreteDiffusion("linear").corrupt(
        tokens, torch.full((count,), t, dtype=torch.float64), generator()).masked.numpy()
    observed = np.bincount(masked @ (2 ** np.arange(n)), minlength=2 ** n)
    bits = np.array([bin(i).count("1") for i in range(2 ** n)])
    expected = t ** bits * (1 - t) ** (n - bits)
    expected[0] = 0
    expected *= count / expected.sum()
    assert observed[0] == 0
    assert chi_squared_p(observed[1:], expected[1:]) > 0.001


def test_a_row_without_text_is_refused():
    with pytest.raises(UserError, match="without any text"):
        DiscreteDiffusion().corrupt(torch.tensor([[BOS, EOS, PAD]]), torch.tensor([0.5]),
                                    generator())


# ---- the bound, against enumeration --------------------------------------------------------------

def enumerated_nelbo(model: TableModel, row: tuple) -> float:
    """Mean over all orders of the sum of -log p of each letter given those before it."""
    total = 0.0
    orders = list(itertools.permutations(range(3)))
    for order in orders:
        state = [MASK] * 3
        for position in order:
            total -= math.log(model.probabilities(tuple(state))[position, row[position] - 4])
            state[position] = row[position]
    return total / len(orders)


def table_batch() -> tuple[np.ndarray, float]:
    """All 27 rows, and their enumerated bound in nats/token."""
    rows = np.array([[BOS, *row, EOS] for row in all_rows()])
    model = TableModel()
    return rows, float(np.mean([enumerated_nelbo(model, row) for row in all_rows()])) / 3


def test_nelbo_is_the_sum_over_orders(table_model):
    rows, expected = table_batch()
    bound = DiscreteDiffusion().nelbo(table_model, [rows], draws=1500)
    # the error of the mean over draws: rows are all there, so the spread between draws counts
    estimates = (bound.n * bound.nats / bound.k).reshape(1500, 27).mean(1) / 3
    error = estimates.std() / 1500 ** 0.5
    assert error < 0.01 * expected
    assert abs(bound.nats_per_token - expected) < 4 * error
    assert bound.total_nats == pytest.approx(bound.nats_per_token * 81)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_training_loss_is_the_same_bound_under_every_schedule(table_model, schedule):
    rows, expected = table_batch()
    diffusion = DiscreteDiffusion(schedule, "elbo")
    source = generator(5)
    with torch.no_grad():
        losses = [float(diffusion.loss(table_model, torch.from_numpy(rows), source))
                  for _ in range(1500)]
    error = np.std(losses) / len(losses) ** 0.5
    assert error < 0.01 * expected
    assert abs(np.mean(losses) - expected) < 4 * error


def test_masked_ce_is_the_plain_mean(table_model):
    rows = torch.from_numpy(table_batch()[0])
    diffusion = DiscreteDiffusion("linear", "masked_ce")
    corrupted = diffusion.corrupt(rows, diffusion.times(27, generator()), generator(1))
    logits, targets = table_model.hidden(corrupted.noisy)[corrupted.masked], rows[corrupted.masked]
    mean = -logits.log_softmax(-1)[torch.arange(len(targets)), targets].mean()
    torch.testing.assert_close(diffusion.loss(table_model, corrupted), mean)
    # without a generator the noise is torch's own, new each time
    torch.manual_seed(1)
    first = diffusion.loss(table_model, rows)
    assert first != diffusion.loss(table_model, rows)
    torch.manual_seed(1)
    assert first == diffusion.loss(table_model, rows)


@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_parts_of_a_batch_add_up(table_model, objective):
    rows = torch.from_numpy(table_batch()[0])
    diffusion = DiscreteDiffusion("cosine", objective)
    corrupted = diffusion.corrupt(rows, diffusion.times(27, generator()), generator(1))
    whole = diffusion.loss(table_model, corrupted.to(torch.device("cpu")))
    parts = [diffusion.loss(table_model, corrupted[part])
             for part in torch.arange(27).chunk(4)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_nelbo_does_not_depend_on_the_batching(table_model):
    rows = table_batch()[0]
    whole = DiscreteDiffusion().nelbo(table_model, [rows], draws=3)
    single = DiscreteDiffusion().nelbo(table_model, [row[None] for row in rows], draws=3)
    np.testing.assert_allclose(whole.row_nats()[0], single.row_nats()[0], rtol=1e-12)
    # masks belong to the number of a row, wherever it stands
    some = DiscreteDiffusion().nelbo(table_model, [rows[[5, 2]]], draws=3,
                                     numbers=[np.array([5, 2])])
    np.testing.assert_allclose(some.row_nats()[0], whole.row_nats()[0][[2, 5]], rtol=1e-12)
    other = DiscreteDiffusion().nelbo(table_model, [rows], draws=3, seed=1)
    assert other.total_nats != whole.total_nats


def test_mask_counts_are_stratified_and_the_model_gets_its_mode_back(table_model):
    table_model.train()
    bound = DiscreteDiffusion().nelbo(table_model, [table_batch()[0]], draws=100)
    assert table_model.training
    counts = np.bincount(bound.k, minlength=4)[1:]
    assert abs(counts - 900).max() < 10  # independent draws would scatter by about 25


def made_up_bound() -> Nelbo:
    k = np.arange(1, 21)
    # cross-entropy 1 + ratio, accuracy 1/2 in every bin
    return Nelbo(row=np.repeat(np.arange(10), 2), n=np.full(20, 20), k=k, nats=k * (1 + k / 20),
                 correct=k / 2)


def test_curve_and_averages_over_t():
    bound = made_up_bound()
    curve = bound.curve()
    assert [point["low"] for point in curve] == pytest.approx(np.arange(20) / 20)
    assert curve[9]["cross_entropy"] == pytest.approx(1.5)
    averages = bound.averages()
    # E[r(t)] for t uniform: 1/2, 1 - 2/pi, 1/2, 2/pi; bins stand for their upper edge, + 1/40
    for name, mean in (("t", 0.5), ("1-cos(pi t/2)", 1 - 2 / math.pi), ("sin(pi t/2)^2", 0.5),
                       ("sin(pi t/2)", 2 / math.pi)):
        assert averages[name]["cross_entropy"] == pytest.approx(1 + mean + 1 / 40, abs=2e-3)
        assert averages[name]["accuracy"] == pytest.approx(0.5)
    # bins without a draw are left out, the rest still averages
    few = Nelbo(*(getattr(bound, name)[:6] for name in bound.__dataclass_fields__))
    assert len(few.curve()) == 6


def test_standard_error_and_units():
    bound = made_up_bound()
    nats, tokens = bound.row_nats()
    assert bound.nats_per_token == pytest.approx(nats.sum() / 200)
    # rows of equal length: the ordinary standard error of the mean
    assert bound.standard_error == pytest.approx(nats.std(ddof=1) / 10 ** 0.5 / 20)
    assert bound.bits_per_byte(10.0, 100) == pytest.approx((nats.sum() + 10) / math.log(2) / 100)


# ---- samplers, against enumeration ---------------------------------------------------------------

def transformed(probability: np.ndarray, sampler: Sampler) -> np.ndarray:
    """What temperature, top-k and top-p make of (..., 3) probabilities, written independently."""
    result = np.zeros_like(probability)
    for index in np.ndindex(probability.shape[:-1]):
        p = probability[index] ** (1 / sampler.temperature)
        p /= p.sum()
        ranked = np.argsort(-p, kind="stable")
        if sampler.top_k:
            ranked = ranked[:sampler.top_k]
        p = p / p[ranked].sum()
        kept, total = [], 0.0
        for token in ranked:
            kept.append(token)
            total += p[token]
            if total >= sampler.top_p:
                break
        result[index][kept] = p[kept] / p[kept].sum()
    return result


def plans(sampler: Sampler, hidden: int) -> list[tuple[float, list[int]]]:
    """The counts of the steps of a planned pace, and how probable they are."""
    if sampler.pace != "first_hitting":
        return [(1.0, plan(np.array([hidden]), sampler.steps, sampler.pace)[0].tolist())]
    ways = Counter(tuple(Counter(way).get(k, 0) for k in range(sampler.steps))
                   for way in itertools.product(range(sampler.steps), repeat=hidden))
    return [(number / sampler.steps ** hidden, list(counts)) for counts, number in ways.items()]


def rank(order: str, p: np.ndarray) -> float:
    """What the highest comes first of, for the (3,) probabilities of a position."""
    best = np.sort(p)[::-1]
    return {"confidence": best[0], "margin": best[0] - best[1],
            "entropy": (p * np.log(p)).sum(), "left": 0.0}[order]


def choices(sampler: Sampler, row: tuple, raw: np.ndarray, count: int) -> list[tuple]:
    """The sets of positions that a step may uncover in `row`, all alike probable."""
    hidden = [i for i in range(3) if row[i] == MASK]
    orders = (list(itertools.permutations(hidden)) if sampler.order == "random" else
              [tuple(sorted(hidden, key=lambda i: -rank(sampler.order, raw[i])))])
    if sampler.pace == "threshold":
        return [tuple(i for place, i in enumerate(order)
                      if place < count or raw[i].max() >= sampler.threshold) for order in orders]
    if sampler.pace == "entropy_bound":
        entropy = [-rank("entropy", p) for p in raw]
        sizes = [max(n for n in range(1, len(order) + 1) if n <= count or sum(
            entropy[i] for i in order[:n]) - max(entropy[i] for i in order[:n]) <= sampler.gamma)
            for order in orders]
        return [order[:size] for order, size in zip(orders, sizes, strict=True)]
    return [order[:count] for order in orders]


def enumerated_samples(model: TableModel, sampler: Sampler, start=(MASK,) * 3) -> dict:
    """Probability of every finished row."""
    total = sum(letter == MASK for letter in start)
    adaptive = sampler.pace in ADAPTIVE_PACES
    result: dict = {}
    for way, counts in [(1.0, plan(np.array([total]), sampler.steps, "cosine")[0].tolist())
                        ] if adaptive else plans(sampler, total):
        states = {start: way}
        for k, count in enumerate(counts):
            after: dict = {}
            for row, weight in states.items():
                left = row.count(MASK)
                if adaptive:  # at least one, and no fewer than the cosine pace by now
                    count = max(left - (total - sum(counts[:k + 1])), min(left, 1))
                if not count:
                    after[row] = after.get(row, 0.0) + weight
                    continue
                raw = model.probabilities(row)
                tokens = transformed(raw, sampler)
                sets = choices(sampler, row, raw, count)
                for chosen in sets:
                    for letters in itertools.product(range(3), repeat=len(chosen)):
                        new, p = list(row), weight / len(sets)
                        for position, letter in zip(chosen, letters, strict=True):
                            new[position] = letter + 4
                            p *= tokens[position, letter]
                        after[tuple(new)] = after.get(tuple(new), 0.0) + p
            states = after
        for row, p in states.items():
            result[row] = result.get(row, 0.0) + p
    return result


def made(order: str, pace: str, steps: int, **options) -> Sampler:
    return Sampler(steps=steps, order=order, pace=pace, **options)


SAMPLERS = [
    *(made(order, pace, 3, threshold=0.6, gamma=0.7) for order in ORDERS for pace in PACES),
    made("random", "cosine", 2), made("random", "cosine", 1), made("random", "linear", 50),
    made("random", "first_hitting", 2), made("confidence", "linear", 2),
    made("confidence", "cosine", 2), made("random", "linear", 3, temperature=0.6),
    made("random", "linear", 2, top_k=2), made("random", "linear", 3, top_p=0.7),
    made("confidence", "linear", 3, temperature=1.5, top_k=2, top_p=0.8),
    made("margin", "threshold", 3, threshold=0.6, temperature=0.5),
    made("entropy", "entropy_bound", 2, gamma=1.0, top_k=2),
]


def sample_table(model, sampler, start=(MASK,) * 3, count=12_000) -> np.ndarray:
    rows = np.tile([BOS, *start, EOS], (count, 1))
    *_, last = DiscreteDiffusion().unmask(model, rows, sampler, seed=11)
    return last.tokens


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("start", [(MASK,) * 3, (5, MASK, MASK)], ids=["blank", "prompt"])
def test_samples_have_the_enumerated_distribution(table_model, sampler, start):
    tokens = sample_table(table_model, sampler, start)
    assert (tokens[:, 0] == BOS).all() and (tokens[:, 4] == EOS).all()
    inner = tokens[:, 1:4] - 4
    observed = np.bincount(inner @ [9, 3, 1], minlength=27)
    expected = np.zeros(27)
    for row, probability in enumerated_samples(table_model, sampler, start).items():
        expected[(np.array(row) - 4) @ [9, 3, 1]] = probability * len(tokens)
    assert expected.sum() == pytest.approx(len(tokens))
    assert chi_squared_p(observed, expected) > 0.001


def drawn_without_replacement(items: list, weights: list, count: int) -> dict:
    """Probability of every set of `count` items."""
    result: dict = {}
    for order in itertools.permutations(range(len(items)), count):
        p, left = 1.0, sum(weights)
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        key = frozenset(items[i] for i in order)
        result[key] = result.get(key, 0.0) + p
    return result


def remasked_samples(model: TableModel, sampler: Sampler, start: tuple) -> dict:
    """Probability of every finished row of the `random` order with `linear` pace, remasking."""
    wanted = [i for i in range(3) if start[i] == MASK]
    total, steps = len(wanted), sampler.steps
    corrector = sampler.remask == "corrector"
    evaluations = [(k, again) for k in range(-(-steps // 2)) for again in (False, True)][:steps] \
        if corrector else [(k, False) for k in range(steps)]
    counts = plan(np.array([total]), evaluations[-1][0] + 1, "linear")[0]
    states = {(start, (0.0,) * 3): 1.0}
    for index, (k, correcting) in enumerate(evaluations):
        left, after = total - int(counts[:k + 1].sum()), {}
        for (row, confidence), weight in states.items():
            hidden = [i for i in range(3) if row[i] == MASK]
            there = total - len(hidden)
            if corrector:
                last = index == len(evaluations) - 1
                expected = 0.0 if correcting or last else sampler.eta * (total - left)
            else:
                most = min(1.0, left / max(there, 1))
                expected = there * (min(sampler.eta, most) if sampler.remask == "remdm_cap"
                                    else sampler.eta * most)
            p = model.probabilities(row)
            for again, p_again in ((math.floor(expected), 1 - expected % 1),
                                   (math.floor(expected) + 1, expected % 1)):
                if not p_again:
                    continue
                count = len(hidden) - left + (0 if corrector else again)
                sets = list(itertools.combinations(hidden, count))
                for chosen in sets:
                    for letters in itertools.product(range(3), repeat=count):
                        new, sure = list(row), list(confidence)
                        chance = weight * p_again / len(sets)
                        for i, letter in zip(chosen, letters, strict=True):
                            new[i], sure[i] = letter + 4, p[i, letter]
                            chance *= p[i, letter]
                        old = [i for i in wanted if new[i] != MASK
                               and (corrector or i not in chosen)]
                        weights = [math.exp(-sure[i]) if sampler.remask == "remdm_confidence"
                                   else 1.0 for i in old]
                        for gone, q in drawn_without_replacement(old, weights, again).items():
                            key = (tuple(MASK if i in gone else x for i, x in enumerate(new)),
                                   tuple(0.0 if i in gone else x for i, x in enumerate(sure)))
                            after[key] = after.get(key, 0.0) + chance * q
        states = after
    result: dict = {}
    for (row, _), p in states.items():
        result[row] = result.get(row, 0.0) + p
    return result


@pytest.mark.parametrize("remask", REMASKS[1:])
@pytest.mark.parametrize("start", [(MASK,) * 3, (5, MASK, MASK)], ids=["blank", "prompt"])
@pytest.mark.parametrize("steps", [4, 5])
def test_remasked_samples_have_the_enumerated_distribution(table_model, remask, start, steps):
    sampler = made("random", "linear", steps, remask=remask, eta=0.4)
    tokens = sample_table(table_model, sampler, start)
    inner = tokens[:, 1:4] - 4
    assert (inner >= 0).all() and (start[0] == MASK or (inner[:, 0] == 1).all())
    observed = np.bincount(inner @ [9, 3, 1], minlength=27)
    expected = np.zeros(27)
    for row, probability in remasked_samples(table_model, sampler, start).items():
        expected[(np.array(row) - 4) @ [9, 3, 1]] = probability * len(tokens)
    assert expected.sum() == pytest.approx(len(tokens))
    assert chi_squared_p(observed, expected) > 0.001
    plain = np.zeros(27)
    for row, probability in enumerated_samples(table_model, made("random", "linear", steps),
                                               start).items():
        plain[(np.array(row) - 4) @ [9, 3, 1]] = probability * len(tokens)
    assert abs(plain - expected).sum() > 0.02 * len(tokens)  # and it does something


def test_temperature_zero_is_greedy(table_model):
    sampler = made("confidence", "linear", 3, temperature=0.0)
    tokens = sample_table(table_model, sampler, count=3)
    row = [MASK] * 3
    for _ in range(3):
        p = table_model.probabilities(tuple(row))
        position = max((i for i in range(3) if row[i] == MASK), key=lambda i: p[i].max())
        row[position] = int(p[position].argmax()) + 4
    assert tokens[:, 1:4].tolist() == [row] * 3


def test_confidence_is_the_probability_of_what_was_drawn(table_model):
    rows = np.array([[BOS, MASK, MASK, MASK, EOS]])
    states = list(DiscreteDiffusion().unmask(table_model, rows, made("random", "linear", 3)))
    for before, after in zip(states, states[1:], strict=False):
        (position,) = np.flatnonzero(after.uncovered[0])
        p = table_model.probabilities(tuple(before.tokens[0, 1:4]))
        letter = after.tokens[0, position] - 4
        assert after.confidence[0, position] == pytest.approx(p[position - 1, letter], rel=1e-5)


def test_draws_are_exact_at_the_edges():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2 ** -53, 3)):
        assert draw_exactly(logits, torch.tensor([u], dtype=torch.float64)).item() == token
    # a token of probability 1e-9 is drawn when its turn comes; FP32 noise would never reach it
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    assert draw_exactly(logits, torch.tensor([1 - 1e-10], dtype=torch.float64)).item() == 1


def test_many_steps_of_any_random_pace_are_the_process_itself(table_model):
    """One token at a time in random order, whatever the pace: the mean over all orders."""
    exact = enumerated_samples(table_model, made("random", "linear", 3))
    for sampler in (made("random", "first_hitting", 400), made("random", "linear", 400),
                    made("random", "cosine", 400)):
        inner = sample_table(table_model, sampler)[:, 1:4]
        observed = Counter(map(tuple, inner.tolist()))
        p = chi_squared_p(*(np.array([count[row] for row in all_rows()]) for count in (
            observed, {row: value * len(inner) for row, value in exact.items()})))
        assert p > 0.001, sampler


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_draws_of_either_precision_have_the_distribution(precision):
    """Uniforms of FP32 are what MPS has; logits may be of either precision too."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(40, generator=generator, dtype=precision)
    uniform = torch.rand(40_000, generator=generator, dtype=precision)
    drawn = draw(logits.expand(len(uniform), -1), uniform, torch.tensor(1.0))
    expected = (logits.double().softmax(-1) * len(uniform)).numpy()
    assert chi_squared_p(np.bincount(drawn, minlength=40), expected) > 0.001


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05]).log()
    for top_p, kept in ((0.4, [1]), (0.51, [1, 2]), (0.81, [0, 1, 2]), (0.96, [0, 1, 2, 3])):
        assert torch.isfinite(keep_likeliest(logits, 0, top_p)).nonzero()[:, 0].tolist() == kept
    assert torch.isfinite(keep_likeliest(logits, 2, 1.0)).nonzero()[:, 0].tolist() == [1, 2]
    # top-p counts what top-k left: 0.5 / 0.8 reaches 0.6
    assert torch.isfinite(keep_likeliest(logits, 2, 0.6)).nonzero()[:, 0].tolist() == [1]
    assert torch.equal(keep_likeliest(logits, 99, 1.0), logits)


def test_the_step_needs_no_fp64_on_the_device(network, monkeypatch):
    """MPS has none: apart from the exact draw, which moves to the CPU there, nothing may use it."""
    inside = []

    def exact(logits, uniform):
        inside.append(True)
        result = draw_exactly(logits, uniform)
        inside.clear()
        return result
    monkeypatch.setattr(step, "draw_exactly", exact)

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not inside:
                assert result.dtype != torch.float64, function
            return result
    tokens = torch.full((2, 16), MASK)
    for order in ORDERS:
        with NoDoubles(), torch.no_grad():
            new, _, _ = UnmaskStep(network, Sampler(order=order, top_k=5, top_p=0.9))(
                tokens, torch.tensor([3, 4]), torch.tensor(0.7), torch.rand(2, 2, 16), 16, 4)
        assert (new != MASK).sum(1).tolist() == [3, 4]


def test_fp16_never_draws_a_special_token_however_hot(network):
    network.set_precision("fp16")
    rows = np.full((4, 30), MASK)
    *_, last = DiscreteDiffusion().unmask(network, rows, Sampler(temperature=1e5, steps=2))
    network.set_precision("fp32")
    assert (last.tokens > EOS).all()


# ---- places at which only some tokens are allowed ------------------------------------------------

def one_of(*letters: int) -> np.ndarray:
    return np.isin(np.arange(7), letters)


def order_probability(model: TableModel, row: tuple, order: tuple) -> float:
    """Of uncovering `row` in this order, one token at a time."""
    now, p = [MASK] * 3, 1.0
    for i in order:
        p *= model.probabilities(tuple(now))[i, row[i] - 4]
        now[i] = row[i]
    return p


def sample_limited(model, sampler, limits: list, count=8000, seed=11) -> np.ndarray:
    rows = [np.array([BOS, MASK, MASK, MASK, EOS])] * count
    filled = {}
    for part, state in unmask_rows(numpy_step(model, sampler), rows, sampler, seed, 5000,
                                   numpy_choice(model, sampler), [limits] * count):
        filled |= zip(part, state.tokens[:, :5], strict=True)
    return np.array([filled[i] for i in range(count)])


def counted(tokens: np.ndarray) -> np.ndarray:
    return np.bincount((tokens[:, 1:4] - 4) @ [9, 3, 1], minlength=27)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("letters", [(4, 6), (5,)], ids=str)
def test_a_limited_place_conditions_the_model_on_it(table_model, place, letters):
    """Enumerated: the joint of the orders that begin with the place, given what it holds."""
    tokens = sample_limited(table_model, made("random", "linear", 3),
                            [(place + 1, one_of(*letters))])
    orders = [order for order in itertools.permutations(range(3)) if order[0] == place]
    expected = np.array([sum(order_probability(table_model, row, order) for order in orders)
                         * (row[place] in letters) for row in all_rows()])
    observed = counted(tokens)
    assert not observed[expected == 0].any()
    assert chi_squared_p(observed, expected / expected.sum() * len(tokens)) > 0.001


@pytest.mark.parametrize("options", [dict(temperature=0.6), dict(top_k=1), dict(top_p=0.6),
                                     dict(temperature=1.5, top_k=2, top_p=0.8)], ids=str)
def test_a_limited_place_is_drawn_as_the_sampler_says(table_model, options):
    """Temperature, top_k and top_p apply to what is allowed: the likeliest letter is not."""
    first = table_model.probabilities((MASK,) * 3)[1]
    allowed = np.arange(3) != first.argmax()
    sampler = made("random", "linear", 3, **options)
    tokens = sample_limited(table_model, sampler, [(2, one_of(*(np.flatnonzero(allowed) + 4)))])
    restricted = np.where(allowed, first, 0.0)
    chance = transformed(restricted / restricted.sum(), sampler)
    expected = np.zeros(27)
    for letter in np.flatnonzero(chance):
        for row, p in enumerated_samples(table_model, sampler,
                                         (MASK, int(letter) + 4, MASK)).items():
            expected[(np.array(row) - 4) @ [9, 3, 1]] += chance[letter] * p * len(tokens)
    observed = counted(tokens)
    assert not observed[expected == 0].any() and chi_squared_p(observed, expected) > 0.001


def test_limited_places_follow_each_other_from_the_left(table_model):
    limits = [(1, one_of(4, 5)), (3, one_of(5, 6))]
    tokens = sample_limited(table_model, made("random", "linear", 3), limits)
    expected = np.zeros(27)
    first = table_model.probabilities((MASK,) * 3)[0]
    for a in (4, 5):
        third = table_model.probabilities((a, MASK, MASK))[2]
        for c in (5, 6):
            second = table_model.probabilities((a, MASK, c))[1]
            for b in (4, 5, 6):
                expected[(a - 4) * 9 + (b - 4) * 3 + c - 4] = (
                    first[a - 4] / first[:2].sum() * third[c - 4] / third[1:].sum()
                    * second[b - 4] * len(tokens))
    assert chi_squared_p(counted(tokens), expected) > 0.001


def test_limited_places_cost_an_evaluation_each_and_are_shown(table_model):
    rows = [np.array([BOS, MASK, MASK, MASK, EOS]), np.array([BOS, 5, MASK, MASK, EOS])]
    limits, sampler = [[(1, one_of(4)), (3, one_of(5, 6))], [(3, one_of(6))]], Sampler(steps=1)
    states = [state for _, state in unmask_rows(
        numpy_step(table_model, sampler), rows, sampler, 0, 8, numpy_choice(table_model, sampler),
        limits)]
    assert [(state.step, state.nfe) for state in states] == [(0, 1), (0, 2), (0, 0), (1, 1)]
    assert [state.evaluated.tolist() for state in states[:2]] == [[True, True], [True, False]]
    assert [np.argwhere(state.uncovered).tolist() for state in states[:2]] == [
        [[0, 1], [1, 3]], [[0, 3]]]
    assert states[0].confidence[0, 1] == 1  # the only one allowed
    third = table_model.probabilities((4, MASK, MASK))[2]
    drawn = states[1].tokens[0, 3]
    assert states[1].confidence[0, 3] == pytest.approx(third[drawn - 4] / third[1:].sum())
    assert states[0].tokens[0, 1:4].tolist() == [4, MASK, MASK]
    assert states[-1].tokens[1, 3] == 6 and states[-1].tokens[0, 1] == 4


# ---- with a real network -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def network():
    from test_model import random_model
    return random_model()


EVERY_KIND = [*(dict(order=order) for order in ORDERS), *(dict(pace=pace) for pace in PACES),
              *(dict(remask=remask, eta=0.3) for remask in REMASKS[1:])]


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_a_story_does_not_depend_on_its_batch(network, kind):
    sampler = Sampler(steps=6, top_p=0.9, gamma=3.0, threshold=0.05, **kind)
    rows = np.full((8, 32), MASK)
    rows[:, 0], rows[:, 20] = BOS, EOS
    rows[:, 21:] = PAD
    rows[2, 3:9] = 7  # rows with other numbers of hidden tokens
    diffusion = DiscreteDiffusion()
    *_, together = diffusion.unmask(network, rows, sampler, seed=3)
    for i in range(8):
        *_, alone = diffusion.unmask(network, rows[i:i + 1], sampler, seed=3, rows=[i])
        assert np.array_equal(alone.tokens[0], together.tokens[i])
    assert not np.array_equal(together.tokens[0], together.tokens[1])
    *_, other = diffusion.unmask(network, rows, sampler, seed=4)
    assert not np.array_equal(other.tokens, together.tokens)


def test_a_limited_place_does_not_depend_on_its_batch(network):
    sampler = Sampler(steps=4)
    rows = [np.array([BOS, *[MASK] * (4 + i % 3), EOS]) for i in range(9)]
    rng = np.random.default_rng(0)
    limits = [[(place, rng.random(network.config.vocab_size) < 0.3) for place in (1, 3)[:1 + i % 2]]
              for i in range(9)]

    def filled(numbers, batch_size: int) -> list:
        result: dict = {}
        for part, state in unmask_rows(
                numpy_step(network, sampler), [rows[i] for i in numbers], sampler, 3, batch_size,
                numpy_choice(network, sampler), [limits[i] for i in numbers]):
            result |= {i: state.tokens[line].tolist() for line, i in enumerate(part)}
        return [result[i] for i in range(len(numbers))]
    together = filled(range(9), 9)
    assert filled(range(9), 2) == together == filled(range(9), 1)
    assert filled(range(4), 4) == together[:4]
    assert together[0][1] != together[6][1]  # rows have noise of their own
    for row, places in zip(together, limits, strict=True):
        assert all(allowed[row[place]] for place, allowed in places)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_a_limited_place_is_drawn_from_the_logits_of_the_step(guidance):
    """With a condition too: all tokens allowed, one hidden place, the same distribution."""
    from test_conditional import CONDITIONS, small_conditional
    model, sampler = small_conditional(), Sampler(steps=1, guidance=guidance, temperature=9)
    row = np.array([[BOS, 11, MASK, 12, EOS]])
    uniform, drawn = np.linspace(0.01, 0.99, 25), []
    step = numpy_step(model, sampler, CONDITIONS)
    for u in uniform:
        noise = np.full((1, 2, 5), u)
        drawn.append(step(row, np.array([1]), noise, np.array([1]))[0][0, 2])
    choice = numpy_choice(model, sampler, CONDITIONS)
    allowed = np.ones((25, model.config.vocab_size), bool)
    tokens, _ = choice(np.repeat(row, 25, 0), np.full(25, 2), allowed, uniform, np.full(25, 1))
    assert tokens.tolist() == drawn and len(set(drawn)) > 3


@pytest.mark.parametrize("kind", [dict(pace="first_hitting"), dict(remask="remdm_cap"),
                                  dict(remask="corrector"),
                                  dict(remask="corrector", pace="first_hitting")], ids=str)
def test_rows_that_rest_in_some_steps_do_not_depend_on_their_batch(network, kind):
    """More steps than tokens, and rows of other lengths that go on meanwhile."""
    sampler = Sampler(steps=40, eta=0.3, **kind)
    rows = np.full((5, 24), PAD)
    for i, row in enumerate(rows):
        row[:2 + 3 * i + 4] = [BOS, *[MASK] * (3 * i + 4), EOS]
    diffusion = DiscreteDiffusion()
    states = list(diffusion.unmask(network, rows, sampler, seed=3))
    for i in range(5):
        alone = list(diffusion.unmask(network, rows[i:i + 1], sampler, seed=3, rows=[i]))
        assert np.array_equal(alone[-1].tokens[0], states[-1].tokens[i])
        assert alone[-1].nfe == sum(int(state.evaluated[i]) for state in states)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_known_tokens_stay_and_nothing_special_is_drawn(network, kind):
    rows = np.full((4, 16), MASK)
    rows[:, 0], rows[:, 15], rows[:, 5:8] = BOS, EOS, 9
    known = rows != MASK
    sampler, hidden_again = Sampler(steps=5, **kind), 0
    for state in unmask(numpy_step(network, sampler), rows, sampler):
        assert np.array_equal(state.tokens[known], rows[known])
        assert not state.uncovered[known].any() and not state.hidden_again[known].any()
        assert (state.tokens[state.hidden_again] == MASK).all()
        hidden_again += state.hidden_again.sum()
    assert (hidden_again > 0) == (sampler.remask != "none")
    assert (state.tokens[~known] > EOS).all()
    assert (rows == MASK).sum() == 4 * 11  # the caller's array was not touched


def test_time_conditioned_models_are_told_the_share_hidden():
    seen = []

    class Spy(TableModel):
        def hidden(self, tokens, t=None, context=None, at=None):
            seen.append(t.tolist())
            return super().hidden(tokens, at=at)
    rows = np.array([[BOS, MASK, MASK, 5, EOS], [BOS, MASK, MASK, MASK, EOS]])
    list(DiscreteDiffusion().unmask(Spy(), rows, Sampler(pace="linear", steps=3)))
    assert seen[0] == pytest.approx([2 / 3, 1]) and len(seen) == 3


def test_scores_are_what_they_are_called():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.25, 0.15]])
    logits = p.log() + 2.0  # the norm must not matter
    torch.testing.assert_close(SCORES["confidence"](logits), torch.tensor([0.5, 0.6]))
    torch.testing.assert_close(SCORES["margin"](logits), torch.tensor([0.2, 0.35]))
    torch.testing.assert_close(SCORES["entropy"](logits), (p * p.log()).sum(-1))
