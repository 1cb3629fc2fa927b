from cli import UserError

import numpy as np
import pytest

from corpus.tokens import BOS, EOS, MASK, PAD
from sampling import noise, sampler
from sampling.loop import fill, unmask, unmask_rows
from sampling.noise import step_noise
from sampling.paces import hitting_plan, plan
from sampling.rows import blank_story, draw_length
from sampling.sampler import Sampler


@pytest.mark.parametrize("changes", [
    {"order": "best"}, {"pace": "fast"}, {"steps": 0}, {"steps": 10**14}, {"temperature": -1.0},
    {"remask": "all"}, {"threshold": 0.0}, {"threshold": 1.1}, {"gamma": -1.0}, {"eta": 1.1},
    {"remask": "remdm_cap", "pace": "threshold"}, {"remask": "corrector", "pace": "entropy_bound"},
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"left_share": 1.0, "order": "left"}, {"left_share": -0.1, "order": "left"},
    {"carry": -0.1}, {"carry": 1.1},
    {"left_share": 0.3}, {"left_share": 0.3, "order": "random"},
    {"left_share": 0.3, "order": "left", "pace": "threshold"}])
def test_nonsense_is_refused(changes):
    with pytest.raises(UserError, match=f"--{next(iter(changes))}"):
        Sampler(**changes).check()


def test_plans_uncover_everything():
    hidden = np.array([0, 1, 7, 100, 256])
    for pace in ("cosine", "linear", "threshold"):
        for steps in (1, 2, 7, 64, 1000):
            counts = plan(hidden, steps, pace)
            assert counts.shape == (5, steps)
            assert (counts >= 0).all() and counts.sum(1).tolist() == hidden.tolist()
    assert plan(np.array([8]), 4, "linear").tolist() == [[2, 2, 2, 2]]
    # enough steps: one token at a time, so that the draw is exact
    assert plan(np.array([7]), 7, "linear").tolist() == [[1] * 7]
    assert plan(np.array([7]), 20, "linear").max() == 1
    cosine = plan(np.array([100]), 10, "cosine")[0]
    assert cosine[0] < cosine[-1]
    left = 100 - cosine.cumsum()
    np.testing.assert_allclose(left, 100 * np.cos(np.pi / 2 * np.arange(1, 11) / 10), atol=1)


def test_hitting_times_are_those_of_the_process():
    """Each token falls into each of the K intervals alike, whatever its batch."""
    hidden = np.full(3000, 4)
    counts = hitting_plan(hidden, 5, 1, range(3000))
    assert counts.shape == (3000, 5) and (counts.sum(1) == 4).all()
    assert abs(counts.mean(0) - 0.8).max() < 0.06
    assert counts.var() == pytest.approx(4 * 0.2 * 0.8, rel=0.1)  # binomial
    assert np.array_equal(hitting_plan(hidden[:1], 5, 1, [7])[0], counts[7])
    assert hitting_plan(np.array([6]), 10**6, 1, [0]).max() == 1


def test_rows_with_nothing_to_uncover_do_not_reach_the_network():
    calls = []
    tokens = np.array([[BOS, MASK, MASK, MASK, EOS], [BOS, 9, MASK, 9, EOS], [BOS, 9, 9, 9, EOS]])
    states = list(unmask(next_number(calls), tokens, Sampler(pace="linear", steps=3)))
    assert [len(count) for count, _ in calls] == [2, 1, 1]
    assert not (states[-1].tokens == MASK).any()


def test_the_corrector_spends_every_second_evaluation():
    calls = []
    tokens = np.array([[BOS, *[MASK] * 8, EOS]])
    sampler = Sampler(pace="linear", steps=8, remask="corrector", eta=0.5)
    states = list(unmask(next_number(calls), tokens, sampler))
    hidden = [int((state.tokens == MASK).sum()) for state in states]
    assert [int(count[0]) for count, _ in calls] == [2, 1, 2, 2, 2, 3, 2, 4]
    assert hidden == [8, 7, 6, 6, 4, 5, 2, 4, 0]


def next_number(calls):
    """A step that uncovers the leftmost hidden tokens of a row with the number of the call."""
    def step(tokens, count, noise, rows, carried):
        assert carried is None
        calls.append((count.copy(), noise.copy()))
        new = tokens.copy()
        for row, n in zip(new, count, strict=True):
            row[np.flatnonzero(row == MASK)[:n]] = 10 + len(calls)
        return new, np.full(tokens.shape, 0.5, np.float32), None
    return step


def test_the_loop_yields_every_state():
    calls = []
    tokens = np.array([[BOS, MASK, MASK, EOS], [BOS, MASK, 9, EOS]])
    states = list(unmask(next_number(calls), tokens, Sampler(pace="linear", steps=4)))
    # 2 hidden tokens in 4 steps: two of them have nothing to do and cost nothing
    assert len(calls) == 2 and [state.nfe for state in states] == [0, 1, 2]
    assert np.array_equal(states[0].tokens, tokens)
    assert states[-1].tokens.tolist() == [[BOS, 11, 12, EOS], [BOS, 11, 9, EOS]]
    assert states[-1].uncovered.tolist() == [[False, False, True, False], [False] * 4]
    assert states[-1].confidence.tolist() == [[0, 0.5, 0.5, 0], [0, 0.5, 0, 0]]


def test_noise_is_a_function_of_seed_row_and_step():
    noise = step_noise(1, 2, 3, 5)
    assert noise.shape == (2, 5) and (0 <= noise).all() and (noise < 1).all()
    assert np.array_equal(noise, step_noise(1, 2, 3, 5))
    for other in ((2, 2, 3), (1, 1, 3), (1, 2, 4)):
        assert not np.array_equal(noise, step_noise(*other, 5))
    # padding gets none, so that a row's noise does not depend on its padding
    calls = []
    for width in (4, 7):
        row = np.full((1, width), PAD)
        row[0, :4] = [BOS, MASK, MASK, EOS]
        list(unmask(next_number(calls), row, Sampler(steps=1)))
    assert np.array_equal(calls[0][1][0], calls[1][1][0, :, :4])
    assert not calls[1][1][0, :, 4:].any()


def test_rows_of_any_length_are_filled_in_order():
    rows = [blank_story(n) for n in (3, 40, 5, 20, 4)]
    filled = fill(next_number([]), rows, Sampler(steps=2), batch_size=2)
    assert [len(row) for row in filled] == [5, 42, 7, 22, 6]
    assert all(row[0] == BOS and row[-1] == EOS and MASK not in row for row in filled)
    batches = {tuple(part) for part, _ in unmask_rows(next_number([]), rows, Sampler(steps=1),
                                                      batch_size=2)}
    # rows share a batch only with rows of the same padded width
    assert batches == {(0, 2), (4,), (3,), (1,)}


def test_lengths_follow_the_histogram():
    histogram = {"story": {"12": 30, "22": 10}}
    drawn = [draw_length(histogram, 0, row) for row in range(400)]
    assert set(drawn) == {10, 20} and 250 < drawn.count(10) < 350
    assert drawn[7] == draw_length(histogram, 0, 7)
    assert {draw_length(histogram, 0, row, at_least=11) for row in range(20)} == {20}
    assert draw_length(histogram, 0, 0, at_least=21) is None
    # lengths and noise come from streams of their own
    first = [np.random.default_rng([1, 5, row]).random() for row in range(3)]
    assert not np.isin(first, [step_noise(5, row, 0, 8) for row in range(3)]).any()


def test_no_two_uses_of_randomness_share_a_stream():
    numbers = [value for name, value in vars(noise).items() if name.endswith("_STREAM")]
    assert len(numbers) == 11 and len(set(numbers)) == 11


def test_presets_and_costs_are_those_of_the_tables():
    assert {name: (values["steps"], values["order"], values["temperature"], values["top_p"])
            for name, values in sampler.PRESETS.items()} == {
        "fast": (16, "random", 1.0, 0.9), "balanced": (32, "random", 1.0, 0.9),
        "best": (64, "random", 1.0, 0.9)}
    assert [Sampler(guidance=guidance).evaluations_per_step for guidance in (0, 0.5, 1, 2)] == [
        1, 2, 1, 2]
