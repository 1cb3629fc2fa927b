"""Self-conditioning: what a pass expects at the hidden places enters the next one."""

from cli import UserError

import itertools
import json
import math

import conftest
import numpy as np
import pytest
import torch

import evaluate
import export_jetson
import generate
import train
from block_diffusion import JointDiffusion
from corpus.tokens import BOS, EOS, MASK, PAD
from diffusion import DiscreteDiffusion
from jetson.engine_runtime import Bundle
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from kinds.likelihood import Corrupted, first_pass
from kinds.registry import kind_of
from model import MODEL_CONFIGS, DiffusionTransformer, create_conditional_model
from network.layers import CARRIED, ModelConfig, likeliest, rms_norm
from sampling import drawing
from sampling.left_to_right import rows_of, write_blocks
from sampling.loop import fill, unmask, unmask_rows
from sampling.rows import blank_story
from sampling.sampler import Sampler
from sampling.step import UnmaskStep, numpy_step

SMALL = ModelConfig(width=32, heads=2, layers=2, vocab_size=40, max_len=48, self_conditioning=0.5)


def network(config: ModelConfig = SMALL, seed: int = 0) -> DiffusionTransformer:
    """One whose parts all do something, and whose choices are sharp."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    return network()


def noisy_rows(count: int = 3, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(EOS + 1, 40, (count, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    hidden = torch.rand(count, length, generator=generator) < 0.5
    hidden[:, [0, -1]], hidden[:, 2] = False, True
    return tokens.masked_fill(hidden, MASK)


# ---- network -------------------------------------------------------------------------------------

def test_a_new_network_carries_nothing_to_the_bit():
    torch.manual_seed(0)
    model = DiffusionTransformer(SMALL)
    tokens = noisy_rows()
    plain = model.hidden(tokens)
    assert torch.equal(model.hidden(tokens, carried=expected_of(model, tokens)), plain)
    # and zeros are nothing for a trained one
    model = network()
    plain = model.hidden(tokens)
    assert torch.equal(model.hidden(tokens, carried=torch.zeros(3, 12, 2 * CARRIED)), plain)
    assert not torch.allclose(model.hidden(tokens, carried=expected_of(model, tokens)), plain,
                              atol=1e-2)


def expected_of(model: DiffusionTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """(B, L, 2 CARRIED): what a first pass expects everywhere."""
    with torch.no_grad():
        return model.expected(model.hidden(tokens).flatten(0, 1)).view(*tokens.shape, -1)


def test_what_is_expected_are_the_likeliest_tokens_and_their_probabilities(model):
    states = torch.randn(700, 32, generator=torch.Generator().manual_seed(4))  # several chunks
    found = model.expected(states)
    p = model.head(states).softmax(-1)
    order = p.argsort(-1, descending=True)[:, :CARRIED]
    assert torch.equal(found[:, :CARRIED].long(), order)
    torch.testing.assert_close(found[:, CARRIED:], p.gather(1, order))
    # beside NumPy's, of which the exported graphs' host has need
    logits = model.head(states)
    rows = np.where(np.arange(700) % 3, MASK, 9)[None]
    by_numpy = drawing.expected(logits.detach().numpy()[None], rows, CARRIED)[0]
    np.testing.assert_allclose(by_numpy[rows[0] == MASK], likeliest(logits).detach().numpy()[
        rows[0] == MASK], rtol=1e-5)
    assert not by_numpy[rows[0] != MASK].any()
    # the mean that the next pass is told of
    mean = model.mean_embedding(found[None, :5])[0]
    by_hand = sum(found[:5, CARRIED + k, None] * rms_norm(model.embedding.weight)[order[:5, k]]
                  for k in range(CARRIED))
    torch.testing.assert_close(mean, by_hand)


def test_what_is_carried_is_read_at_hidden_places_alone(model):
    tokens = noisy_rows()
    carried = expected_of(model, tokens)
    expected = model.hidden(tokens, carried=carried)
    visible = (tokens != MASK)[..., None]
    assert torch.equal(model.hidden(tokens, carried=carried.masked_fill(visible, 9.0)), expected)
    moved = carried.clone()
    moved[0, 2, :CARRIED] = moved[0, 2, :CARRIED].flip(0)
    assert not torch.allclose(model.hidden(tokens, carried=moved)[0], expected[0], atol=1e-3)


def test_a_causal_model_has_none():
    with pytest.raises(Exception, match="self_conditioning"):
        ModelConfig(causal=True, self_conditioning=0.5)


# ---- training and likelihood ---------------------------------------------------------------------

def batch_of(tokens: torch.Tensor) -> Corrupted:
    masked = tokens == MASK
    return Corrupted(tokens.masked_fill(masked, 7), tokens, masked, masked.float(),
                     torch.ones(len(tokens)))


def test_the_first_pass_is_of_a_share_of_the_rows_and_has_no_gradient(model):
    tokens = noisy_rows(400, 6)
    batch, asked = batch_of(tokens), []

    def read(rows):
        asked.append(int(rows.sum()))
        return batch[rows].read(model, None)
    model.train()
    torch.manual_seed(0)
    carried = first_pass(model, batch.masked, None, read)["carried"]
    given = carried.abs().sum((1, 2)) > 0
    assert asked == [int(given.sum())] and 150 < asked[0] < 250
    assert not carried.requires_grad
    where = batch.masked & given[:, None]
    torch.testing.assert_close(carried[where], expected_of(model, tokens)[where])
    assert not carried[~where].any()
    model.eval()
    first_pass(model, batch.masked, None, read)
    assert asked[1] == 400
    assert first_pass(network(ModelConfig(width=32, heads=2, layers=1, vocab_size=40)),
                      batch.masked, None, read) == {}


def test_gradients_are_those_of_the_second_pass(model):
    batch = batch_of(noisy_rows())
    carried = expected_of(model, batch.noisy)
    results = []
    for hidden in (lambda: batch.hidden(model), lambda: batch.read(model, None, carried=carried)):
        model.zero_grad()
        model.loss(hidden(), batch.tokens[batch.masked], batch.weight[batch.masked]).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][[name for name, _ in model.named_parameters()].index("carry.weight")].any()


def test_the_bound_stays_one():
    """exp(-bound), summed over every text of three tokens, is at most one: the bound, over all
    masks and not only some, is that of a distribution over texts."""
    config = ModelConfig(width=32, heads=2, layers=2, vocab_size=8, max_len=8,
                         self_conditioning=1.0)
    model = network(config, 3)
    texts = torch.tensor(list(itertools.product(range(EOS + 1, 8), repeat=3)))
    rows = torch.cat([torch.full((len(texts), 1), BOS), texts, torch.full((len(texts), 1), EOS)], 1)
    log_p = {}  # of each hidden token, by mask
    for mask in itertools.product((False, True), repeat=3):
        if any(mask):
            masked = torch.tensor([False, *mask, False]).expand_as(rows)
            batch = Corrupted(rows, rows.masked_fill(masked, MASK), masked, masked.float(),
                              torch.ones(len(rows)))
            with torch.no_grad():
                nats, _ = model.scores(batch.hidden(model), rows[masked])
            log_p[mask] = -nats.view(len(rows), -1).double().numpy()
    bound = sum(log.mean(1) / math.comb(3, sum(mask)) for mask, log in log_p.items())
    total = np.exp(bound).sum()
    # the mean over all orders of the product along each: what the process itself would write
    exact = np.zeros(len(rows))
    for order in itertools.permutations(range(3)):
        hidden, log = [True] * 3, np.zeros(len(rows))
        for place in order:
            log += log_p[tuple(hidden)][:, sum(hidden[:place])]
            hidden[place] = False
        exact += np.exp(log) / 6
    assert exact.sum() == pytest.approx(1, rel=1e-5)
    assert (np.exp(bound) <= exact * (1 + 1e-6)).all() and 0.1 < total < 1
    # and it is the one that `nelbo` measures, with as many draws as there are masks
    measured = DiscreteDiffusion().nelbo(model, [rows.numpy()], draws=400).row_nats()[0]
    assert np.corrcoef(measured, -bound)[0, 1] > 0.99
    assert measured.mean() == pytest.approx(-bound.mean(), rel=0.01)


def test_the_bound_does_not_depend_on_the_batch(model):
    tokens = noisy_rows(5).masked_fill(noisy_rows(5) == MASK, 9).numpy()
    for kind in (DiscreteDiffusion(), JointDiffusion(), JointDiffusion(mode="4")):
        whole = kind.nelbo(model, [tokens]).nats
        parts = kind.nelbo(model, [tokens[:2], tokens[2:]]).nats
        np.testing.assert_allclose(whole, parts, rtol=1e-4)


def test_blocks_are_read_twice_too(model):
    """Each noisy half of the joint model's batch, with the clean tokens before its block."""
    kind = JointDiffusion(sizes=(4,))
    tokens = torch.full((2, 16), 9)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    batch = kind.corrupt_batch(tokens, torch.Generator().manual_seed(0))
    plain = network()
    plain.config = ModelConfig(**{**vars(SMALL), "self_conditioning": 0.0})
    with torch.no_grad():
        twice, once = batch.hidden(model), batch.hidden(plain)
    assert not torch.allclose(twice, once, atol=1e-2)
    *_, (states, *_) = batch.parts(plain)
    assert torch.equal(states, once)
    # what a later block carries changes no earlier one
    other = batch.noisy.clone()
    other[:, 12:15] = 20
    changed = JointDiffusion(sizes=(4,)).corrupt_batch(tokens, torch.Generator().manual_seed(0))
    changed.noisy = other
    early = batch.masked.nonzero()[:, 1] < 12
    with torch.no_grad():
        torch.testing.assert_close(changed.hidden(model)[early], twice[early])


# ---- sampling ------------------------------------------------------------------------------------

SAMPLERS = [Sampler(steps=5), Sampler(steps=4, order="confidence"), Sampler(steps=6, top_p=0.8),
            Sampler(steps=5, pace="first_hitting"),
            Sampler(steps=6, remask="remdm_confidence", eta=0.5),
            Sampler(steps=6, remask="corrector", eta=0.5), Sampler(steps=5, pace="threshold",
                                                                   threshold=0.3)]


def test_nats_of_a_gap_are_those_of_filling_it_from_the_left(model):
    """Beside the probabilities that `--order left` gives for the very tokens that it draws."""
    sampler = Sampler(steps=9, order="left", pace="linear")
    gap = np.array([BOS, 9, *[MASK] * 4, 12, 7, MASK, EOS])
    *_, last = unmask(numpy_step(model, sampler), gap[None], sampler, 3)
    nats = DiscreteDiffusion().gap_nats(model, last.tokens[0], gap)
    assert nats == pytest.approx(-np.log(last.confidence[last.confidence > 0]).sum(), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_gap_is_filled_by_one_distribution_and_every_place_is_looked_at_anew(model, share):
    """Of all that may stand in it the probabilities add up to 1; and they are by hand those of a
    pass over the row told of another pass over it, with some of the causal one."""
    row, gap = np.array([BOS, 9, 5, 6, 12, EOS]), np.array([BOS, 9, MASK, MASK, 12, EOS])
    kind = JointDiffusion()
    total = 0.0
    for pair in itertools.product(range(EOS + 1, 40), repeat=2):
        row[2:4] = pair
        total += math.exp(-kind.gap_nats(model, row, gap, share))
    assert total == pytest.approx(1, abs=1e-4)
    by_hand = 0.0
    with torch.no_grad():
        for place in (2, 3):
            now = torch.tensor(np.where(np.arange(6) < place, row, gap))[None]
            hidden = now == MASK
            carried = torch.zeros(1, 6, 2 * CARRIED)
            carried[hidden] = model.expected(model.hidden(now)[hidden])
            both = model.head(model.hidden(now, carried=carried)[0, place])
            left = model.head(model.hidden(torch.tensor([[PAD, *row[:place]]]), view=model.view(
                torch.arange(-1, place), causal=True))[0, -1])
            mixed = (1 - share) * both + share * left if share else both
            by_hand -= float(mixed.log_softmax(-1)[row[place]])
    assert kind.gap_nats(model, row, gap, share) == pytest.approx(by_hand, rel=1e-5)


def test_the_loop_counts_every_look_at_a_gap(model):
    row = np.array([[BOS, 9, *[MASK] * 3, 12, EOS]])
    for share, looks in ((0.0, 2), (0.3, 3)):
        sampler = Sampler(steps=9, order="left", pace="linear", left_share=share)
        *_, last = unmask(JointDiffusion().step(model, sampler), row, sampler)
        assert last.nfe == 3 * looks
    with pytest.raises(UserError, match="--left_share: this is a diffusion model"):
        DiscreteDiffusion().step(model, sampler)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_how_far_a_step_trusts_the_one_before(model, share):
    """It is told the same tokens with so much of their probabilities; with nothing of them it looks
    anew, as it does at first, and every look counts."""
    sampler, told, made = Sampler(steps=5, carry=share), [], []
    step = numpy_step(model, sampler)

    def watched(*given):
        told.append(given[-1])
        *result, carried = step(*given)
        made.append(carried)
        return *result, carried
    *_, last = unmask(watched, blank_story(14)[None], sampler, 3)
    assert told[0] is None and last.nfe == (10 if share == 0 else 6)
    for before, now in zip(made, told[1:], strict=False):
        if share:
            assert np.array_equal(now[..., :CARRIED], before[..., :CARRIED])
        np.testing.assert_allclose(now[..., CARRIED:], share * before[..., CARRIED:], rtol=1e-6)
        assert now.any() == (share > 0)
    *_, anew = unmask(lambda *given: step(*given[:-1], None), blank_story(14)[None], sampler, 3)
    assert (anew.tokens == last.tokens).all() == (share == 0)


def test_a_trust_that_would_change_nothing_is_refused(trained, tmp_path, fails):
    def error(name, *more):
        return fails(generate.main, "--checkpoint", trained / f"{name}/best.pt", *more)
    assert "no self-conditioning" in error("plain", "--carry", "0.5")
    assert "--carry belongs to an --order" in error("carried", "--carry", "0.5", "--order", "left")
    assert "--carry" in error("joint", "--carry", "0.5", "--block_size", "1")
    assert "--carry" in error("joint", "--carry", "0.5", "--verify")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_sampler_carries_what_the_step_before_made(model, sampler):
    """Every evaluation is told what the one before expected at the places that were hidden both
    times, and nothing elsewhere; so also where a token is hidden again."""
    seen = []

    class Watched(DiffusionTransformer):
        def hidden(self, tokens, *args, at=None, carried=None, **others):
            whole = super().hidden(tokens, *args, carried=carried, **others)
            seen.append((tokens.clone(), carried, whole))
            return super().hidden(tokens, *args, at=at, carried=carried, **others)
    watched = Watched(SMALL).eval()
    watched.load_state_dict(model.state_dict())
    rows = np.stack([blank_story(14)])
    list(unmask(numpy_step(watched, sampler), rows, sampler, 3))
    assert seen[0][1] is None and len(seen) > 2
    # nothing is known at first: the same row is looked at twice
    assert torch.equal(seen[0][0], seen[1][0]) and seen[1][1] is not None
    again = 0
    for (before, _, states), (tokens, carried, _) in itertools.pairwise(seen):
        if carried is None:  # all that is hidden is new: a look before the step
            continue
        expected = model.expected(states.flatten(0, 1)).view(*before.shape, -1)
        stayed = (before == MASK) & (tokens == MASK)
        if sampler.remask == "corrector":  # may hide what it has drawn in the same step
            stayed &= carried.any(-1)
        torch.testing.assert_close(carried[stayed], expected[stayed], atol=1e-5, rtol=1e-4)
        fresh = (before != MASK) & (tokens == MASK)
        assert not carried[fresh].any()
        again += int(fresh.sum())
    assert bool(again) == (sampler.remask != "none")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_story_does_not_depend_on_its_batch(model, sampler):
    rows = [blank_story(n) for n in (9, 14, 12, 10)]
    together = fill(numpy_step(model, sampler), rows, sampler, 5)
    alone = fill(numpy_step(model, sampler), rows, sampler, 5, batch_size=1)
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


def test_blocks_begin_with_nothing_carried(model):
    """A block in as many steps as it has tokens, against the network on the row so far."""
    calls = []
    kind = JointDiffusion(mode="4")
    sampler = Sampler(steps=4)
    reader = kind.reader(model, sampler)
    step = reader.step

    def watched(tokens, count, noise, rows, carried):
        result = step(tokens, count, noise, rows, carried)
        calls.append((carried, result[2], result[0]))
        return result
    reader.step = watched
    rows = rows_of(write_blocks(reader, [np.array([BOS])] * 8, sampler, 4, 16, 1),
                   [np.array([BOS])] * 8)
    assert all(row[0] == BOS for row in rows)
    assert calls[0][0] is None and calls[1][0] is not None and calls[0][1].any()
    assert sum(carried is None for carried, *_ in calls) >= 2  # of each block
    for _, made, new in calls:
        assert not made[new != MASK].any() and made[new == MASK].any(-1).all()


def test_with_guidance_what_is_drawn_from_is_carried():
    torch.manual_seed(0)
    model = create_conditional_model("tiny", "tiny", 40, 16, max_len=32, self_conditioning=1.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    told = np.array([[BOS, 9, 8, EOS]])
    tokens = torch.from_numpy(np.stack([blank_story(12)]))
    step = UnmaskStep(model, Sampler(guidance=2.0))
    context = model.encode(torch.from_numpy(told))
    with torch.no_grad():
        new, _, carried = step(
            tokens, torch.tensor([3]), torch.tensor(1.0), torch.rand(
                1, 2, tokens.shape[1], generator=torch.Generator().manual_seed(0)), 12, 3, context)
        places = torch.arange(tokens.shape[1])[None]
        before = step.known(tokens, 12, torch.ones(1), context, None)
        logits = step.logits(tokens, places, torch.ones(1), context, before)
    still = new == MASK
    torch.testing.assert_close(carried[still], likeliest(logits)[still])
    sampler = Sampler(steps=4, guidance=2.0)
    filled = fill(numpy_step(model, sampler, told), [blank_story(12)], sampler)
    assert MASK not in filled[0]


# ---- programs ------------------------------------------------------------------------------------

def train_args(data_dir, folder, *flags) -> list[str]:
    return ["--data_dir", str(data_dir), "--checkpoint_dir", str(folder), "--model_config", "tiny",
            "--batch_tokens", "512", "--valid_every", "3", "--valid_rows", "8", "--num_samples",
            "1", "--sample_steps", "2", "--device", "cpu", "--precision", "fp32", "--max_steps",
            "4", *flags]


@pytest.fixture(scope="module")
def trained(long_data_dir, once):
    """A plain model, and two that went on from it with self-conditioning: masked and joint."""
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:  # as `small_tiny` has it in tests
            patch.setitem(MODEL_CONFIGS, "tiny", conftest.SMALL)
            make_all(folder)

    def make_all(folder):
        train.main(train_args(long_data_dir, folder / "plain"))
        for name, flags in (("carried", ()), ("joint", ("--objective", "joint"))):
            train.main(train_args(
                long_data_dir, folder / name, "--init_from", str(folder / "plain/best.pt"),
                "--self_conditioning", "0.5", *flags))
            sharpen(folder / name / "best.pt")
    return once("self_conditioned", make)


def sharpen(path) -> None:
    """Four steps leave a model with no opinions: its matrices are made larger."""
    checkpoint = load_checkpoint(path, None)
    model = model_from_checkpoint(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(
                len(name))), alpha=0.15)
    save_checkpoint(path, model, checkpoint["tokenizer"], checkpoint["length_histogram"],
                    checkpoint["kind"], train_config=checkpoint["train_config"])


def test_trainings_go_on_from_a_plain_model_and_resume(trained, long_data_dir, tmp_path, fails):
    plain, carried = (load_checkpoint(trained / name / "last.pt", None)
                      for name in ("plain", "carried"))
    assert "carry.weight" not in plain["weights"] and carried["weights"]["carry.weight"].any()
    assert carried["model_config"]["self_conditioning"] == 0.5
    parts = tmp_path / "parts"
    args = ("--self_conditioning", "0.5", "--dropout", "0.1")
    train.main([*train_args(long_data_dir, parts, *args), "--max_steps", "2"])
    error = fails(train.main, "--resume", "--checkpoint_dir", str(parts), "--self_conditioning",
                  "0")
    assert "cannot change" in error
    # a model that has it is no start for one without
    error = fails(train.main, *train_args(long_data_dir, tmp_path / "less", "--init_from",
                                          str(trained / "carried/best.pt")))
    assert "other parts" in error
    error = fails(train.main, *train_args(long_data_dir, tmp_path / "no", "--self_conditioning",
                                          "0.5", "--objective", "autoregressive"))
    assert "--self_conditioning" in error
    assert "from 0 to 1" in fails(train.main, *train_args(
        long_data_dir, tmp_path / "no", "--self_conditioning", "1.5"))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(long_data_dir, tmp_path):
    weights = []
    for name, stops in (("whole", ()), ("parts", ("2",))):
        args = train_args(long_data_dir, tmp_path / name, "--self_conditioning", "0.5",
                          "--save_every", "1", "--ema_decay", "0")
        args[args.index("--max_steps") + 1] = "4"
        run = train.main
        if stops:
            from training.config import TrainConfig
            from training.trainer import Trainer
            conftest.stop_after(Trainer(TrainConfig(
                data_dir=str(long_data_dir), checkpoint_dir=str(tmp_path / name),
                model_config="tiny", batch_tokens=512, valid_every=3, valid_rows=8, num_samples=1,
                sample_steps=2, device="cpu", precision="fp32", max_steps=4,
                self_conditioning=0.5, save_every=1, ema_decay=0.0)), 2)
            run(["--resume", "--checkpoint_dir", str(tmp_path / name)])
        else:
            run(args)
        weights.append(load_checkpoint(tmp_path / name / "last.pt", None)["weights"])
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_stages_of_a_condition_keep_it(trained, pairs_dir, checkpoint, tmp_path):
    folder = tmp_path / "stage2"
    source = load_checkpoint(trained / "carried/best.pt")
    # the pairs have the vocabulary of another folder
    told = load_checkpoint(checkpoint)
    path = tmp_path / "carried.pt"
    config = {**told["model_config"], "self_conditioning": 0.5}
    model = network(ModelConfig(**config))
    save_checkpoint(path, model, told["tokenizer"], told["length_histogram"],
                    train_config=told["train_config"] | {"self_conditioning": 0.5})
    assert source["train_config"]["self_conditioning"] == 0.5
    train.main(["--stage", "2", "--decoder_checkpoint", str(path), "--data_dir", str(pairs_dir),
                "--checkpoint_dir", str(folder), "--batch_tokens", "512", "--valid_every", "3",
                "--valid_rows", "8", "--num_samples", "1", "--sample_steps", "2", "--device",
                "cpu", "--precision", "fp32", "--max_steps", "3"])
    stage_2 = load_checkpoint(folder / "best.pt", "conditional")
    assert stage_2["model_config"]["self_conditioning"] == 0.5
    assert torch.equal(stage_2["weights"]["carry.weight"], model.carry.weight)


def test_programs_write_and_measure(trained, capsys, long_data_dir):
    for name in ("carried", "joint"):
        path = str(trained / name / "best.pt")
        for flags in (("--steps", "4"), *[("--block_size", "4", "--steps", "2")] * (
                name == "joint")):
            capsys.readouterr()
            generate.main(["--checkpoint", path, "--num_samples", "2", "--json", *flags])
            lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
            assert len(lines) == 2
        evaluate.main(["--checkpoint", path, "--max_rows", "4", "--draws", "1", "--num_samples",
                       "0", "--data_dir", str(long_data_dir)])
    result = json.loads((trained / "carried/evaluation.json").read_text())
    assert "two passes" in result["protocol"]
    capsys.readouterr()


# ---- export --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def carried_bundle(trained, long_data_dir, once):
    def make(folder):
        for name in ("carried", "joint"):
            export_jetson.main(["--checkpoint", str(trained / name / "best.pt"), "--out_dir",
                                str(folder / name), "--report_rows", "2", "--calibration_rows", "2",
                                "--data_dir", str(long_data_dir)])
    return once("carried_bundle", make)


@pytest.mark.parametrize("sampler", [
    Sampler(steps=5, top_k=64), Sampler(steps=6, remask="corrector", eta=0.5, top_k=64),
    Sampler(steps=5, order="confidence", top_k=64)])
def test_the_exported_step_carries_as_torch_does(carried_bundle, trained, sampler):
    model = model_from_checkpoint(load_checkpoint(trained / "carried/best.pt")).for_inference()
    bundle = Bundle(carried_bundle / "carried/step_fp32.onnx")
    rows = [blank_story(20), blank_story(40), blank_story(37)]

    def stories(step):
        return [state.tokens.tolist() for _, state in unmask_rows(step, rows, sampler, seed=4)]
    assert stories(bundle.step(sampler)) == stories(numpy_step(model, sampler))


def test_every_precision_carries(carried_bundle):
    reports = json.loads((carried_bundle / "carried/bundle.json").read_text())["reports"]
    assert set(reports) == {"fp32", "fp16", "int8"}
    for precision, loss in (("fp32", 1e-3), ("fp16", 0.05), ("int8", 0.3)):
        report = reports[precision]
        assert report["nelbo"] == pytest.approx(report["nelbo_torch_fp32"], rel=loss)
        bundle = Bundle(carried_bundle / f"carried/step_{precision}.onnx")
        assert bundle.session.inputs["carried"][0][-1] == 2 * CARRIED
        filled = fill(bundle.step(Sampler(steps=3)), [blank_story(20)], Sampler(steps=3))
        assert MASK not in filled[0] and PAD not in filled[0]


def test_blocks_of_the_cached_graph_carry_as_torch_does(carried_bundle, trained):
    checkpoint = load_checkpoint(trained / "joint/best.pt", "joint")
    model = model_from_checkpoint(checkpoint).for_inference()
    sampler = Sampler(steps=4)
    bundle = Bundle(carried_bundle / "joint/cached_fp32.onnx")
    starts = [np.array([BOS])] * 3
    written = [rows_of(write_blocks(reader, starts, sampler, 8, 40, 2), starts) for reader in (
        bundle.reader(sampler, tokens=8), kind_of(checkpoint).reader(model, sampler))]
    assert [row.tolist() for row in written[0]] == [row.tolist() for row in written[1]]
