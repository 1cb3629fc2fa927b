"""The model with a condition: network, guidance, stages of training, generation."""


import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TableModel, chi_squared_p, stop_after
from test_train import STATE, argv, same

import evaluate
import generate
import prep_conditional_data
import train
from corpus.conditions import condition_row
from corpus.tokens import BOS, EOS, MASK, PAD
from diffusion import DiscreteDiffusion
from kinds.checkpoints import load_checkpoint
from kinds.likelihood import Corrupted, weighted_loss
from model import ConditionalTransformer, create_conditional_model, create_model, is_of_condition
from network import attention, layers
from network.encoders import TextEncoder
from sampling.loop import RowCache, fill
from sampling.sampler import ORDERS, PACES, REMASKS, Sampler
from sampling.step import numpy_step
from training.config import TrainConfig
from training.optimizers import make_optimizers
from training.trainer import Trainer

CONDITIONS = np.stack([condition_row(ids, 16) for ids in (
    [10], [11, 12, 13], list(range(20, 34)), [5, 6, 7, 8])])


def small_conditional(seed: int = 0, trained: bool = True, **changes) -> ConditionalTransformer:
    """Denoiser and encoder of different widths and depths; `trained`: no matrix is zero."""
    torch.manual_seed(seed)
    config = dataclasses.replace(SMALL, **{"vocab_size": 50, "max_len": 32, **changes})
    model = ConditionalTransformer(config, TextEncoder(dataclasses.replace(
        config, width=48, heads=3, layers=3, max_len=16)))
    if trained:
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.3)
        for block in model.blocks:  # the condition counts
            torch.nn.init.normal_(block.cross.gate, std=1.0)
        torch.nn.init.normal_(model.vocabulary.weight, std=1.0)
    return model.eval()


def some_tokens(rows: int = 4, length: int = 32) -> torch.Tensor:
    tokens = torch.randint(4, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[:, -1], tokens[:, 5:20] = BOS, EOS, MASK
    return tokens


@pytest.fixture
def settings(pairs_dir, checkpoint, tmp_path) -> dict:
    return dict(stage=2, decoder_checkpoint=str(checkpoint), data_dir=str(pairs_dir),
                checkpoint_dir=str(tmp_path / "stage2"), max_steps=6, batch_tokens=1024,
                precision="fp32", device="cpu", valid_every=3, valid_rows=8, save_every=2,
                num_samples=1, sample_steps=4)


# ---- network -------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adding_it_changes_nothing_at_first(precision):
    torch.manual_seed(3)
    plain = create_model("tiny", vocab_size=50, max_len=32).set_precision(precision)
    torch.nn.init.normal_(plain.vocabulary.weight)
    model = create_conditional_model("micro", "tiny", vocab_size=50, condition_len=16, max_len=32)
    model.set_precision(precision).load_decoder(plain.state_dict())
    context = model.encode(torch.from_numpy(CONDITIONS))
    tokens = some_tokens()
    assert torch.equal(model(tokens, context=context), plain(tokens))
    assert torch.equal(model(tokens), plain(tokens))
    with pytest.raises(ValueError, match="no cross-attention"):
        plain.hidden(tokens, context=context)


def test_the_condition_is_first_read_as_if_it_stood_before_the_text():
    """What the first block's heads compare and read is that of one row of both."""
    config = dataclasses.replace(SMALL, vocab_size=50, max_len=32)
    torch.manual_seed(0)
    model = ConditionalTransformer(config, TextEncoder(
        dataclasses.replace(config, layers=1, max_len=16)))
    torch.nn.init.normal_(model.blocks[0].attention.query_bias, std=1.0)
    model.start_encoder()
    assert not any(block.cross.gate.any() for block in model.blocks)
    told, text = [7, 8, 9, 10], [11, 12, 13]
    context = model.encode(torch.tensor([[BOS, *told, EOS], [BOS, 9, EOS, PAD, PAD, PAD]]))
    own, cross = model.blocks[0].attention, model.blocks[0].cross

    def read(layer, row):
        x = layers.rms_norm(layers.rms_norm(model.embed(torch.tensor([row]))))
        where = model.cos[:len(row)], model.sin[:len(row)]
        return layer.queries(x, *where), *layer.keys_values(x, *where)
    joined, keys, values = read(own, [BOS, *told, *text, EOS])
    queries, _, _ = read(cross, [BOS, *text, EOS])
    torch.testing.assert_close(queries[0, :, 1:] @ context.keys[0, 0, :, :-1].mT,  # without [EOS]
                               joined[0, :, 5:] @ keys[0, :, :5].mT)
    torch.testing.assert_close(context.values[0, 0, :, :-1], values[0, :, :5])
    joined, keys, _ = read(own, [BOS, 9, *text, EOS])  # a shorter one ends in the same place
    torch.testing.assert_close(queries[0, :, 1:] @ context.keys[0, 1, :, :2].mT,
                               joined[0, :, 2:] @ keys[0, :, :2].mT)


def test_a_trained_one_without_context_is_the_denoiser():
    model = small_conditional()
    plain = create_model("tiny", vocab_size=50, max_len=32)
    plain.load_state_dict({name: value for name, value in model.state_dict().items()
                           if not is_of_condition(name)})
    tokens = some_tokens()
    assert torch.equal(model(tokens), plain(tokens))
    context = model.encode(torch.from_numpy(CONDITIONS))
    assert (model(tokens, context=context) - plain(tokens))[..., EOS + 1:].abs().max() > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_padding_of_the_condition_changes_nothing(precision):
    model = small_conditional().set_precision(precision)
    tokens = some_tokens(1)
    short = torch.tensor([[BOS, 10, 11, 12, EOS]])
    padded = torch.nn.functional.pad(short, (0, 11), value=PAD)
    with torch.no_grad():
        a, b = (model.hidden(tokens, context=model.encode(x)).float() for x in (short, padded))
        other = model.hidden(tokens, context=model.encode(short.flip(1))).float()
    tolerance = 1e-5 if precision == "fp32" else 0.03
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert (a - other).abs().max() > 3 * tolerance  # but the condition does count


def test_every_row_has_a_condition_of_its_own():
    model, tokens = small_conditional(), some_tokens()
    conditions = torch.from_numpy(CONDITIONS).clone()
    conditions[2] = PAD  # none
    with torch.no_grad():
        together = model.hidden(tokens, context=model.encode(conditions))
        for i in range(4):
            row, told = tokens[i:i + 1], conditions[i:i + 1]
            alone = model.hidden(row, context=model.encode(told))
            torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[2:3], model.hidden(tokens[2:3]), atol=1e-5, rtol=1e-5)
        assert torch.equal(model.hidden(tokens[2:3], context=model.encode(conditions[2:3])),
                           model.hidden(tokens[2:3]))


def test_a_longer_condition_than_the_encoder_reads():
    model = small_conditional()
    with pytest.raises(ValueError, match="rows of 32 tokens, but max_len is 16"):
        model.encode(torch.full((1, 32), 5))


def test_sizes_and_their_mistakes():
    model = create_conditional_model("tiny", "micro", vocab_size=500)
    assert model.config.width == 128 and model.encoder.config.width == 32
    assert model.encoder.config.max_len == 64 and model.kind == "conditional"
    total, inside = model.count_parameters()
    assert total - inside == 500 * (128 + 32)
    with pytest.raises(Exception, match="unknown size 'huge'"):
        create_conditional_model("huge")
    with pytest.raises(Exception, match="takes no condition"):
        create_conditional_model("tiny", "tiny", causal=True)
    with pytest.raises(Exception, match="the same vocabulary"):
        ConditionalTransformer(SMALL, TextEncoder(dataclasses.replace(SMALL, vocab_size=99)))
    with pytest.raises(RuntimeError, match="not the weights"):
        model.load_decoder({name: value for name, value in model.state_dict().items()
                            if name != "blocks.0.up.weight"})


def test_frozen_weights_do_not_move():
    model = small_conditional(trained=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.freeze_decoder()
    tokens = some_tokens()
    masked = tokens == MASK
    batch = Corrupted(tokens.masked_fill(masked, 7), tokens, masked, masked.float() / masked.sum(),
                      torch.ones(4), torch.from_numpy(CONDITIONS))
    optimizers = make_optimizers(model, "muon", 0.01, 0.1, "fp32")
    model.vocabulary.weight.data.normal_()
    before["embedding.weight"] = model.embedding.weight.clone()
    for _ in range(3):
        weighted_loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if is_of_condition(name)}
    model.unfreeze()
    assert all(p.requires_grad for p in model.parameters())


# ---- sampling ------------------------------------------------------------------------------------

def rows_to_fill() -> list[np.ndarray]:
    return [np.array([BOS, *[MASK] * 9, 20, *[MASK] * 4, EOS]) for _ in range(4)]


@pytest.mark.parametrize("sampler", [
    *(Sampler(steps=4, order=order, pace=pace, gamma=1.0, threshold=0.2) for order in ORDERS
      for pace in PACES),
    *(Sampler(steps=4, remask=remask, eta=0.3) for remask in REMASKS[1:]),
    Sampler(steps=4, temperature=0.0), Sampler(steps=4, top_k=5, top_p=0.9)])
def test_guidance_1_is_the_conditional_and_0_the_unconditional_model(sampler):
    model = small_conditional()

    def told(guidance: float) -> list[list[int]]:
        settings = dataclasses.replace(sampler, guidance=guidance)
        return [row.tolist() for row in fill(numpy_step(model, settings, CONDITIONS),
                                             rows_to_fill(), settings, seed=2)]
    plain = [row.tolist() for row in fill(numpy_step(model, sampler), rows_to_fill(), sampler, 2)]
    assert told(0.0) == plain
    given = ConditionalTransformer.hidden
    always = model.encode(torch.from_numpy(CONDITIONS))

    class Given(torch.nn.Module):
        """The conditional network as if it had no other side."""
        config, head = model.config, staticmethod(model.head)

        def hidden(self, tokens, t=None, context=None, at=None):
            rows = always if len(tokens) == 4 else pytest.fail("rows left the batch")
            return given(model, tokens, t, rows, at=at)
    if sampler.pace in ("cosine", "linear"):
        assert told(1.0) == [row.tolist() for row in fill(
            numpy_step(Given(), sampler), rows_to_fill(), sampler, 2)]
    assert told(1.0) != plain and told(3.0) != told(1.0)
    for row in told(3.0):
        assert row[10] == 20 and min(row[1:-1]) > EOS


def test_guidance_sharpens_the_distribution_as_its_formula_says():
    class Both(TableModel):
        """A table for texts with a condition and another one without."""

        def __init__(self):
            super().__init__(seed=0)
            self.plain = TableModel(seed=1)

        def encode(self, condition):
            return attention.Context(*(torch.zeros(1, len(condition), 1, 1, 1),) * 2,
                                        torch.zeros(len(condition), 1, 1, 1))

        def hidden(self, tokens, t=None, context=None, at=None):
            return (self.plain if context is None else super()).hidden(tokens, at=at)
    model, count = Both(), 4000
    sampler = Sampler(steps=1, guidance=2.5)
    rows = [np.array([BOS, 4, MASK, 6, EOS])] * count
    told = np.tile(condition_row([5], 16), (count, 1))
    drawn = [int(row[2]) for row in fill(numpy_step(model, sampler, told), rows, sampler, 7,
                                         batch_size=count)]
    with_it, without = (np.log(table.probabilities((4, MASK, 6))[1])
                        for table in (TableModel(0), TableModel(1)))
    wanted = np.exp(without + 2.5 * (with_it - without))
    expected = wanted / wanted.sum() * count
    assert chi_squared_p(np.bincount(drawn, minlength=7)[4:].astype(float), expected) > 0.001
    assert chi_squared_p(np.bincount(drawn, minlength=7)[4:].astype(float),
                         np.exp(with_it) * count) < 1e-6


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_text_does_not_depend_on_its_batch(guidance):
    model, sampler = small_conditional(), Sampler(steps=5, guidance=guidance)
    rows = rows_to_fill()
    rows[1] = np.array([BOS, *[MASK] * 25, EOS])  # another width
    step = numpy_step(model, sampler, CONDITIONS)
    together = fill(step, rows, sampler, seed=3)
    for batch_size in (1, 3):
        again = fill(numpy_step(model, sampler, CONDITIONS), rows, sampler, 3, batch_size)
        assert all(map(np.array_equal, together, again))
    moved = fill(numpy_step(model, sampler, CONDITIONS[[1, 1, 1, 1]]), rows, sampler, seed=3)
    assert np.array_equal(moved[1], together[1]) and not np.array_equal(moved[0], together[0])


def test_a_condition_is_encoded_once_for_a_text(monkeypatch):
    model = small_conditional()
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda told: calls.append(told.tolist()) or encode(told))
    for pace in ("cosine", "first_hitting"):
        calls.clear()
        sampler = Sampler(steps=6, pace=pace, guidance=2.0)
        fill(numpy_step(model, sampler, CONDITIONS), rows_to_fill(), sampler, batch_size=2)
        assert sorted(calls) == sorted([[row.tolist()] for row in CONDITIONS])
    monkeypatch.setattr(RowCache, "SIZE", 2)
    kept = RowCache(lambda row: row + 10)
    assert kept.of(np.array([3, 0, 1])) == [13, 10, 11] and kept.of(np.array([0])) == [10]
    assert list(kept.known) == [1, 0]


def test_bound_of_a_conditional_model(pairs_dir):
    model = small_conditional()
    tokens = some_tokens().numpy()
    tokens[tokens == MASK] = 9
    own = DiscreteDiffusion().nelbo(model, [tokens], conditions=lambda rows: CONDITIONS[rows])
    turned = DiscreteDiffusion().nelbo(model, [tokens],
                                       conditions=lambda rows: CONDITIONS[(rows + 1) % 4])
    none = DiscreteDiffusion().nelbo(model, [tokens])
    empty = DiscreteDiffusion().nelbo(model, [tokens],
                                      conditions=lambda rows: np.zeros((4, 16), np.int64))
    assert np.allclose(none.nats, empty.nats, rtol=1e-5)
    assert not np.allclose(own.nats, turned.nats) and not np.allclose(own.nats, none.nats)
    assert np.array_equal(own.k, none.k)


# ---- stages of training --------------------------------------------------------------------------

def test_stage_2_trains_the_condition_alone_and_stage_3_everything(settings, checkpoint, tmp_path,
                                                                   capsys):
    train.main(argv(settings))
    text = capsys.readouterr().out
    assert "trained)" in text and "  | (" in text  # a story with its condition
    plain = load_checkpoint(checkpoint)
    done = load_checkpoint(tmp_path / "stage2" / "best.pt", kind="conditional")
    assert done["train_config"]["model_config"] == "tiny"
    for weights in ("weights", "ema"):
        for name, value in plain["ema"].items():
            assert torch.equal(done[weights][name], value), name
        new = [name for name in done[weights] if name not in plain["ema"]]
        assert all(map(is_of_condition, new)) and len(new) == 25
        assert all(done[weights][name].any() for name in new if name.endswith("cross.gate"))
    # the encoder has started with the denoiser's weights, and has moved
    name = "blocks.0.up.weight"
    start, end = plain["ema"][name], done["weights"][f"encoder.{name}"]
    assert not torch.equal(start, end) and torch.nn.functional.cosine_similarity(
        start.flatten(), end.flatten(), dim=0) > 0.5
    # 3. everything
    third = {**settings, "stage": 3, "decoder_checkpoint": tmp_path / "stage2" / "best.pt",
             "checkpoint_dir": tmp_path / "stage3"}
    train.main(argv(third))
    last = load_checkpoint(tmp_path / "stage3" / "best.pt", kind="conditional")
    assert not any(torch.equal(last["weights"][name], value) for name, value in
                   done["ema"].items() if value.ndim == 2)
    assert TrainConfig(**last["train_config"]).peak_lr == pytest.approx(0.004)


@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_resumes_bit_identically(stage, settings, tmp_path, checkpoint, pairs_dir):
    if stage == 3:
        Trainer(TrainConfig(**settings)).run()
        settings = {**settings, "stage": 3,
                    "decoder_checkpoint": str(tmp_path / "stage2" / "last.pt")}
    folders = [str(tmp_path / name) for name in ("whole", "stopped")]
    Trainer(TrainConfig(**{**settings, "checkpoint_dir": folders[0]})).run()
    trainer = Trainer(TrainConfig(**{**settings, "checkpoint_dir": folders[1]}))
    stop_after(trainer, 4)
    train.main(["--checkpoint_dir", folders[1], "--resume"])
    a, b = (load_checkpoint(f"{folder}/last.pt", kind="conditional") for folder in folders)
    for name in STATE:
        assert same(a[name], b[name]), name


def test_dropped_conditions_are_a_share_of_the_rows(settings, tmp_path):
    trainer = Trainer(TrainConfig(**settings))
    assert all(bool((trainer.steps.loader.next().corrupted.condition[:, 0] == BOS).all())
               for _ in range(5))
    trainer.run()
    third = Trainer(TrainConfig(**{**settings, "stage": 3, "condition_dropout": 0.5,
                                   "checkpoint_dir": str(tmp_path / "stage3"),
                                   "decoder_checkpoint": str(tmp_path / "stage2" / "last.pt")}))
    told = torch.cat([third.steps.loader.next().corrupted.condition[:, 0] for _ in range(60)])
    share = float((told == PAD).float().mean())
    assert abs(share - 0.5) < 4 * (0.25 / len(told)) ** 0.5


def test_the_condition_is_learned():
    """The text repeats the word of the condition, which nothing else tells."""
    model = small_conditional(trained=False)
    optimizers = make_optimizers(model, "muon", 0.02, 0.0, "fp32")
    generator = np.random.default_rng(0)

    def batch(shift: int = 0) -> Corrupted:
        words = generator.integers(4, 50, 64)
        tokens = torch.from_numpy(np.array([[BOS, word, word, word, EOS] for word in words]))
        told = torch.from_numpy(np.array([[BOS, word, EOS] for word in np.roll(words, shift)]))
        masked = tokens > EOS
        return Corrupted(tokens, tokens.masked_fill(masked, MASK), masked,
                         masked.float() / masked.sum(), torch.ones(64), told)
    for _ in range(80):
        weighted_loss(model, batch()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert weighted_loss(model, batch()) < 1 and weighted_loss(model, batch(1)) > 4


def test_an_encoder_of_another_size(settings):
    settings = {**settings, "encoder_config": "micro"}
    trainer = Trainer(TrainConfig(**settings))
    model = trainer.network.model
    assert model.encoder.config.width == 128 and model.config.width == 32
    trainer.steps.take()


@pytest.mark.parametrize(("changes", "message"), [
    (dict(decoder_checkpoint=None), "name it with --decoder_checkpoint"),
    (dict(stage=1), "--decoder_checkpoint belongs to --stage 2 or 3"),
    (dict(stage=3), "diffusion model; what is needed here is of the kind: conditional model"),
    (dict(stage=3, encoder_config="tiny"), "--encoder_config belongs to --stage 2"),
    (dict(condition_dropout=0.2), "--condition_dropout belongs to --stage 3"),
    (dict(model_config="micro"), "goes on with the model of"),
    (dict(objective="autoregressive"), "the autoregressive twin takes no condition"),
    (dict(encoder_config="huge"), "unknown size"),
    (dict(data_dir="nowhere"), "prep_conditional_data.py"),
    (dict(data_dir="plain"), "has no conditions"),
    (dict(checkpoint_dir="its own"), "--decoder_checkpoint lies there and would be replaced")])
def test_bad_settings(changes, message, settings, long_data_dir, fails, tmp_path):
    places = {"plain": str(long_data_dir), "its own": Path(settings["decoder_checkpoint"]).parent}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    words = argv({name: value for name, value in {**settings, **changes}.items()
                  if value is not None})
    assert message in fails(train.main, *words)
    assert not (tmp_path / "stage2").exists()


def test_conditions_longer_than_an_encoder_reads(settings, conditional_checkpoint, long_data_dir,
                                                 tmp_path, fails):
    lines = [{"condition": "Tom ran " * 12, "text": f"The story of number {i}."} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prep_conditional_data.main(["--data_dir", str(long_data_dir), "--pairs",
                                str(tmp_path / "mine.jsonl"), "--valid_fraction", "0.2",
                                "--output_dir", str(tmp_path / "pairs")])
    settings |= dict(data_dir=tmp_path / "pairs", stage=3,
                     decoder_checkpoint=conditional_checkpoint)
    words = "reads at most 32: prepare them with --condition_len 32"
    assert words in fails(train.main, *argv(settings))
    assert not (tmp_path / "stage2").exists()
    assert words in fails(evaluate.main, "condition", "--checkpoint", conditional_checkpoint,
                          "--data_dir", tmp_path / "pairs", "--output", tmp_path / "x.json")


def test_every_row_of_a_batch_comes_with_its_own_condition(settings):
    trainer = Trainer(TrainConfig(**settings))
    told = {tuple(row): tuple(trainer.network.conditions[i])
            for i, row in enumerate(trainer.data.rows)}
    assert len(set(told.values())) > 20
    for _ in range(5):
        batch = trainer.steps.loader.next().corrupted
        for row, condition in zip(batch.tokens.numpy(), batch.condition.numpy(), strict=True):
            assert told[tuple(row[row != PAD])] == tuple(condition[condition != PAD])
    asked = []
    trainer.network.average.encode = lambda rows: asked.append(rows) or None
    trainer.validation.bound()
    chosen = [i for part in trainer.validation.batches for i in part]
    rows = [tuple(row[row != PAD]) for batch in asked for row in batch.numpy()]
    assert set(rows) == {tuple(trainer.network.valid_conditions[i]) for i in chosen}


def test_no_more_stories_are_shown_than_there_are_conditions(settings):
    trainer = Trainer(TrainConfig(**{**settings, "num_samples": 1000}))
    assert len(trainer.validation.stories()) == len(trainer.data.valid) < 1000


def test_a_stage_is_resumed_as_that_stage(settings, fails):
    Trainer(TrainConfig(**settings)).run()
    folder = ["--checkpoint_dir", settings["checkpoint_dir"], "--resume"]
    assert "was started with 2, which cannot change" in fails(
        train.main, *folder, "--stage", "3")
    assert "--condition_dropout belongs to" in fails(
        train.main, *folder, "--condition_dropout", "0.3")
    assert "has an encoder already" in fails(train.main, *argv({
        **settings, "checkpoint_dir": settings["checkpoint_dir"] + "b", "encoder_config": "tiny",
        "decoder_checkpoint": settings["checkpoint_dir"] + "/best.pt"}))


# ---- command line --------------------------------------------------------------------------------

@pytest.fixture
def call(conditional_checkpoint, capsys):
    def run(*argv: object) -> tuple[list[dict], str]:
        generate.main(["--checkpoint", str(conditional_checkpoint), "--steps", "4", "--json",
                       *map(str, argv)])
        captured = capsys.readouterr()
        return [json.loads(line) for line in captured.out.splitlines()], captured.err
    return run


def test_texts_follow_from_conditions(call, conditional_checkpoint, tmp_path, capsys):
    told = call("--condition", "Lily found a key.", "--num_samples", 2, "--guidance", 2)
    assert [line["condition"] for line in told[0]] == ["Lily found a key."] * 2
    assert told[0][0]["guidance"] == 2 and told[0][0]["nfe"] == 8  # two a step
    assert "8 network evaluations" in told[1]
    file = tmp_path / "conditions.txt"
    file.write_text("Tom ran.\n\nLily found a key.\n")
    lines = call("--conditions", file, "--guidance", 2, "--length", 20)[0]
    assert [line["condition"] for line in lines] == ["Tom ran.", "Lily found a key."]
    again = call("--conditions", file, "--guidance", 2, "--length", 20, "--batch_size", 1)[0]
    assert lines == again
    pairs = tmp_path / "conditions.jsonl"
    pairs.write_text('{"condition": "Tom ran."}\n{"condition": "Lily found a key."}')
    assert call("--conditions", pairs, "--guidance", 2, "--length", 20)[0] == lines
    assert len(call("--conditions", file, "--num_samples", 3, "--length", 9)[0]) == 6
    generate.main(["--checkpoint", str(conditional_checkpoint), "--steps", "2", "--condition",
                   "Lily found a key.", "--num_samples", "1"])
    assert "--- 1 ---\nLily found a key." in capsys.readouterr().out


def test_guidance_0_and_no_condition_are_the_plain_model(call, checkpoint, capsys):
    plain = [line["text"] for line in call("--num_samples", 2)[0]]
    assert [line["text"] for line in call("--condition", "Tom ran.", "--num_samples", 2,
                                          "--guidance", 0)[0]] == plain
    assert [line["text"] for line in call("--condition", "Tom ran.", "--num_samples", 2)[0]
            ] != plain
    generate.main(["--checkpoint", str(checkpoint), "--steps", "4", "--json", "--num_samples", "2"])
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == plain


def test_prompts_and_gaps_go_with_a_condition(call):
    told = ["--condition", "Tom ran.", "--guidance", 1.5, "--num_samples", 2]
    for line in call(*told, "--prompt", "Then Tom", "--length", 30)[0]:
        assert line["text"].startswith("Then Tom")
    for line in call(*told, "--prompt", " Then Tom", "--length", 30)[0]:
        assert line["text"].startswith(" Then Tom")
    for line in call(*told, "--infill", "Tom [MASK:4] home.")[0]:
        assert line["text"].startswith("Tom") and line["text"].endswith(" home.")


def test_a_condition_of_one_token_and_one_that_is_too_long(call):
    assert call("--condition", "a", "--num_samples", 1)[0]
    lines, error = call("--condition", "so " * 50 + "it was", "--num_samples", 1)
    assert "is cut to the 30 that this model reads: 'so so so" in error and len(lines) == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--condition", " "], "the condition is empty"),
    (["--condition", "a", "--conditions", "b"], "give one of them"),
    (["--conditions", "nowhere.txt"], "no such file"),
    (["--guidance", "2"], "--guidance belongs to --condition"),
    (["--guidance", "-1", "--condition", "a"], "must be 0 or more"),
    (["--condition", "\udcff"], "not valid Unicode")])
def test_bad_conditions(words, message, conditional_checkpoint, fails):
    assert message in fails(generate.main, "--checkpoint", conditional_checkpoint, *words)


def test_bad_condition_files(conditional_checkpoint, tmp_path, fails):
    for name, content, message in (("a.txt", b"\n \n", "holds no condition"),
                                   ("b.txt", b"\xff\xfe", "not UTF-8"),
                                   ("c.jsonl", b'{"text": "x"}', "line 1: expected"),
                                   ("d.json", b'{"condition": "x"}', "use a .txt file"),
                                   ("E.JSONL", b'{"text": "x"}', "line 1: expected")):
        (tmp_path / name).write_bytes(content)
        assert message in fails(generate.main, "--checkpoint", conditional_checkpoint,
                                "--conditions", tmp_path / name)


def test_a_plain_model_takes_no_condition(checkpoint, fails):
    words = "diffusion model; what is needed here is of the kind: conditional or conditional_joint"
    assert words in fails(
        generate.main, "--checkpoint", checkpoint, "--condition", "Tom ran.")
