"""The joint model with a condition: both passes, both caches of guidance, stages of training."""


import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_joint, stop_after
from test_block_diffusion import CLOSE, all_hidden_once, together
from test_conditional import small_conditional
from test_train import STATE, argv, lines, same
from torch import Tensor

import evaluate
import train
from block_diffusion import CAUSAL, JointDiffusion, causal_pass
from corpus.conditions import condition_row
from corpus.tokens import BOS, EOS, PAD
from kinds.autoregressive import before_each
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from kinds.conditional import ConditionalJoint
from kinds.registry import kind_of
from model import ConditionalTransformer, is_of_condition
from sampling.cached import CachedModel
from sampling.left_to_right import write_blocks, write_causal, write_verified
from sampling.sampler import Sampler
from training.config import TrainConfig
from training.trainer import Trainer

CONDITIONS = np.stack([condition_row([5 + i] * (1 + i % 4), 16) for i in range(8)])
CONDITIONS[3] = PAD  # none


@pytest.fixture(scope="module")
def model() -> ConditionalTransformer:
    network = small_conditional()
    with torch.no_grad():
        network.vocabulary.weight[[PAD, EOS]] *= 0.1
    return network


def some_rows(count: int, length: int = 24) -> Tensor:
    rows = torch.randint(4, 50, (count, length), generator=torch.Generator().manual_seed(2))
    rows[:, 0] = BOS
    return rows


# ---- both passes ---------------------------------------------------------------------------------

@torch.no_grad()
def test_both_passes_attend_to_the_condition(model):
    batch = all_hidden_once(some_rows(4), 4)
    batch.size = torch.tensor([4, 0, -1, 3])
    given, other = (batch[torch.arange(4)] for _ in range(2))
    given.condition = torch.from_numpy(CONDITIONS[:4])
    other.condition = torch.from_numpy(CONDITIONS[[0, 1, 2, 4]])
    parts = [[hidden for hidden, *_ in one.parts(model)] for one in (batch, given, other)]
    changes = []
    for without, own, turned in zip(*parts, strict=True):
        assert not torch.allclose(own, without, atol=1e-3)
        # the last row alone has another condition; before it had none
        moved = (own - turned).abs().amax(-1) > 1e-5
        torch.testing.assert_close(own[moved], without[moved], **CLOSE)
        changes.append(int(moved.sum()))
    assert changes == [int((batch.next_weight[3] > 0).sum()), int(batch.masked[3].sum()), 0]


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 8])
@torch.no_grad()
def test_cached_equals_uncached_with_guidance(model, size, count):
    batch = all_hidden_once(some_rows(count), size)
    sampler = Sampler(guidance=2.5)
    reader = CachedModel(model, sampler, CONDITIONS)
    reader.begin(np.arange(count))
    reader.read(np.full((count, 1), PAD))
    assert len(reader.caches) == 2
    told = torch.from_numpy(CONDITIONS[:count])
    expected, whole = [], []
    for condition in (told, None):
        batch.condition = condition
        _, (noisy, *_) = batch.parts(model)
        expected.append(model.head(noisy, (EOS, PAD)))
        whole.append(model.head(causal_pass(model, before_each(batch.tokens),
                                            batch.context(model)), (EOS,)))
    cached = [torch.zeros(count, 24, 50) for _ in range(2)]
    for start in range(0, 24, size):
        noisy, tokens = (x[:, start:start + size] for x in (batch.noisy, batch.tokens))
        for held, hidden in zip(cached, reader.passes(noisy, causal=False), strict=True):
            held[:, start:start + size] = model.head(hidden, (EOS, PAD))
        read = torch.from_numpy(reader.read(tokens.numpy(), logits=tokens.shape[1]))
        both = guided(*(x[:, start + 1:start + tokens.shape[1]] for x in whole))
        torch.testing.assert_close(read[:, :-1], both, rtol=1e-4, atol=1e-4)
    for held, other in zip(cached, expected, strict=True):
        torch.testing.assert_close(held[batch.masked], other, **CLOSE)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def guided(own: Tensor, none: Tensor) -> Tensor:
    """Guidance of 2.5 by its formula."""
    return (none + 2.5 * (own - none)).nan_to_num(nan=-torch.inf)


def test_the_likelihood_counts_the_condition_in_every_mode(model):
    rows = some_rows(4).numpy()
    for mode in (CAUSAL, "1", "4", "row"):
        own, turned, none, plain = (ConditionalJoint().in_mode(mode).nelbo(
            model, [rows], draws=2, conditions=conditions).row_nats()[0] for conditions in (
                lambda which: CONDITIONS[which], lambda which: CONDITIONS[which + 1],
                lambda which: np.zeros((len(which), 16), np.int64), None))
        assert none == pytest.approx(plain, rel=1e-5)
        assert (np.abs(own - turned) > 1e-3).all() and (np.abs(own - none)[:3] > 1e-3).all()
        assert own[3] == pytest.approx(none[3], rel=1e-5)


# ---- writers -------------------------------------------------------------------------------------

def writers(guidance: float, **options) -> dict[str, Callable]:
    sampler = Sampler(steps=2, guidance=guidance, **options)

    def of(write, *more, drafts: bool = False):
        def written(model, starts, numbers, conditions=CONDITIONS) -> dict[int, list[int]]:
            reader = CachedModel(model, sampler, conditions)
            own = (reader,) if not drafts else (reader, reader)
            return together(write(*own, starts, sampler, *more, 32, 1, numbers))
        return written
    return {"causal": of(write_causal), "blocks": of(write_blocks, 4),
            "verified": of(write_verified, 4, drafts=True)}


@pytest.mark.parametrize("name", writers(1.0))
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_story_does_not_depend_on_its_batch(model, name, guidance):
    write = writers(guidance)[name]
    starts = [np.array(start) for start in ([BOS], [BOS, 9], [BOS, 7, 8], [BOS], [BOS], [BOS])]
    numbers = [0, 1, 7, 5, 3, 4]
    rows = write(model, starts, numbers)
    assert len({len(row) for row in rows.values()}) > 1
    for start, number in zip(starts, numbers, strict=True):
        assert write(model, [start], [number]) == {number: rows[number]}
    # each by its own condition
    moved = CONDITIONS.copy()
    moved[1] = CONDITIONS[2]
    other = write(model, starts, numbers, moved)
    assert {number for number in numbers if other[number] != rows[number]} == {1}


def test_guidance_0_is_the_model_without_a_condition(model):
    starts = [np.array([BOS])] * 3
    for name, write in writers(0.0).items():
        plain = writers(1.0)[name]
        assert write(model, starts, [0, 1, 2]) == plain(model, starts, [0, 1, 2], None)
        assert plain(model, starts, [0, 1, 2]) != plain(model, starts, [0, 1, 2], None)
        assert writers(3.0)[name](model, starts, [0, 1, 2]) != plain(model, starts, [0, 1, 2])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_greedy_drafts_are_verified_with_their_condition(model, guidance):
    both = writers(guidance, temperature=0.0)
    starts = [np.array([BOS])] * 8
    rows = both["causal"](model, starts, range(8))
    assert both["verified"](model, starts, range(8)) == rows
    assert len({tuple(row) for row in rows.values()}) > 3


def test_a_kind_writes_in_every_mode(model):
    for mode in (CAUSAL, "4", "row"):
        write = ConditionalJoint().in_mode(mode).write
        rows = write(model, [6] * 4, Sampler(steps=3), 2, CONDITIONS)
        turned = write(model, [6] * 4, Sampler(steps=3), 2, CONDITIONS[[1, 1, 2, 3]])
        same_rows = [np.array_equal(a, b) for a, b in zip(rows, turned, strict=True)]
        assert same_rows == [False, True, True, True]


# ---- stages of training --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def joint(checkpoint, tmp_path_factory) -> Path:
    """A joint model with the weights of a plain one."""
    return as_joint(checkpoint, tmp_path_factory.mktemp("joint") / "best.pt")


@pytest.fixture
def settings(pairs_dir, joint, tmp_path) -> dict:
    return dict(objective="joint", block_sizes="causal,4,row", stage=2,
                decoder_checkpoint=str(joint), data_dir=str(pairs_dir),
                checkpoint_dir=str(tmp_path / "stage2"), max_steps=6, batch_tokens=1024,
                precision="fp32", device="cpu", valid_every=3, valid_rows=8, save_every=2,
                num_samples=1, sample_steps=4)


@torch.no_grad()
def test_stage_2_changes_nothing_at_first(settings, joint):
    trainer = Trainer(TrainConfig(**settings))
    kind, plain = trainer.network.kind, model_from_checkpoint(load_checkpoint(joint, "joint"))
    assert isinstance(kind, ConditionalJoint) and kind.modes == ("causal", "4", "row")
    batch = trainer.steps.loader.next().corrupted
    assert (batch.condition > EOS).any(1).all() and {-1, 0, 4} == set(batch.size.tolist())
    without = batch[torch.arange(len(batch.size))]
    without.condition = None
    for one, other in zip(batch.parts(trainer.network.model), without.parts(plain), strict=True):
        assert torch.equal(one[0], other[0])
    told = trainer.network.valid_conditions
    rows = [trainer.data.valid.batch(np.arange(4))]
    for mode in kind.modes:
        a = kind.in_mode(mode).nelbo(trainer.network.model, rows, conditions=told.batch)
        b = JointDiffusion().in_mode(mode).nelbo(plain, rows)
        assert np.array_equal(a.nats, b.nats)


def test_both_stages(settings, tmp_path, joint, capsys, fails):
    train.main(argv(settings))
    text = capsys.readouterr().out
    assert "trained)" in text and "  | (" in text and "(the mean of causal " in text
    plain = load_checkpoint(joint, "joint")["weights"]
    done = load_checkpoint(tmp_path / "stage2" / "best.pt", kind="conditional_joint")
    assert isinstance(kind_of(done), ConditionalJoint)
    for name, value in plain.items():
        assert torch.equal(done["weights"][name], value), name
    assert all(done["weights"][name].any() for name in done["weights"]
               if name.endswith("cross.gate"))
    third = {**settings, "stage": 3, "checkpoint_dir": tmp_path / "stage3",
             "decoder_checkpoint": tmp_path / "stage2" / "best.pt"}
    train.main(argv(third))
    last = load_checkpoint(tmp_path / "stage3" / "best.pt", kind="conditional_joint")
    assert not any(torch.equal(last["weights"][name], value) for name, value in
                   done["ema"].items() if value.ndim == 2)
    assert isinstance(model_from_checkpoint(last), ConditionalTransformer)
    figures = lines(tmp_path / "stage3")[-1]
    assert {f"valid_bits_per_byte_{mode}" for mode in ("causal", "4", "row")} <= figures.keys()


def test_stage_2_resumes_to_the_bit(settings, tmp_path):
    Trainer(TrainConfig(**settings)).run()
    trainer = Trainer(TrainConfig(**{**settings, "checkpoint_dir": str(tmp_path / "stopped")}))
    stop_after(trainer, 4)
    train.main(["--checkpoint_dir", str(tmp_path / "stopped"), "--resume"])
    a, b = (load_checkpoint(tmp_path / name / "last.pt", kind="conditional_joint")
            for name in ("stage2", "stopped"))
    for name in STATE:
        assert same(a[name], b[name]), name


@pytest.mark.parametrize("changes, message", [
    (dict(decoder_checkpoint="plain"), "of the kind: joint or conditional_joint model"),
    (dict(objective="masked_ce"), "--block_sizes: for --objective joint alone"),
    (dict(stage=3), "of the kind: conditional_joint model"),
    (dict(data_dir="plain"), "has no conditions")])
def test_bad_settings(settings, changes, message, checkpoint, long_data_dir, fails):
    plain = {"decoder_checkpoint": checkpoint, "data_dir": long_data_dir}
    changes = {name: plain[name] if value == "plain" else value
               for name, value in changes.items()}
    assert message in fails(train.main, *argv({**settings, **changes}))


# ---- measuring -----------------------------------------------------------------------------------

def test_evaluate_condition_measures_whole_rows(conditional_checkpoint, joint, tmp_path, fails,
                                                capsys):
    source = load_checkpoint(conditional_checkpoint, kind="conditional")
    path = tmp_path / "best.pt"
    save_checkpoint(path, model_from_checkpoint(source), source["tokenizer"],
                    source["length_histogram"], "conditional_joint", ema=None, step=1,
                    train_config=source["train_config"] | {"block_sizes": "4,row"})
    quick = ["--precision", "fp32", "--max_rows", "4", "--draws", "1", "--num_samples", "2",
             "--steps", "2", "--guidances", "1"]
    results = []
    for one, more in ((path, ["--plain", joint]), (conditional_checkpoint, [])):
        evaluate.main(list(map(str, ["condition", "--checkpoint", one, "--output",
                                     tmp_path / "c.json", *quick, *more])))
        results.append(json.loads((tmp_path / "c.json").read_text()))
    joint_one, plain_one = results
    assert joint_one["kind"] == "conditional_joint"
    for key in ("readers", "generation"):
        own = "cross-attention" if key == "readers" else "guidance 1"
        assert joint_one[key][own] == plain_one[key][own]
    for command in ("likelihood", "samplers", "infilling"):
        assert "`python evaluate.py condition`" in fails(evaluate.main, command, "--checkpoint",
                                                         path)


def test_its_own_weights_are_those_of_the_condition(model):
    trained = ConditionalJoint().trained(2)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if trained(name)] == list(filter(is_of_condition, names))
    assert all(map(ConditionalJoint().trained(3), names))
