"""Models that read pictures: the encoder, its training, what is measured and told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import generate
import prep_image_data
import train
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.likelihood import Nelbo
from measuring import pictures as measured
from model import ConditionalTransformer, create_model, is_of_condition
from network.edges import COLOURS, DIRECTIONS, FEATURES, EdgesAndColours
from network.encoders import ENCODERS, FrozenEncoder, ImageEncoder, varied
from network.layers import PRECISIONS, ModelConfig
from training.config import TrainConfig

EMOJI = Path(__file__).parent / "data/emoji"
CAT = Path(__file__).parent / "data/cat.png"
SHORT = ["--batch_tokens", "512", "--valid_every", "3", "--valid_rows", "8", "--num_samples", "1",
         "--sample_steps", "2", "--device", "cpu", "--precision", "fp32"]


def encoder(size: int = 16, **settings) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder.create(ModelConfig(**settings), {"size": size, "encoder": "image"})


def some_pictures(count: int, size: int = 16) -> torch.Tensor:
    pictures = torch.randint(0, 256, (count, size, size, 4), dtype=torch.uint8,
                             generator=torch.Generator().manual_seed(1))
    pictures[..., 3] = 255
    return pictures


# ---- the encoder ---------------------------------------------------------------------------------

def test_what_a_patch_is_given_comes_from_it_and_the_cells_around_it():
    """Which pixels stand in which patch, row by row."""
    reader, pictures = encoder(32), some_pictures(1, 32)
    changed = pictures.clone()
    changed[0, 13, 13, 1] ^= 128  # in the second patch of the second row, its last cell
    with torch.no_grad():
        before, after = (reader.features(batch[..., :3].permute(0, 3, 1, 2) / 127.5 - 1)[0]
                         for batch in (pictures, changed))
    assert before.shape == (16, FEATURES)
    differs = (before != after).view(4, 4, DIRECTIONS + COLOURS, 4)  # a patch's cells last
    assert differs[1, 1].any(0).tolist() == [True] * 4
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True  # the neighbourhoods of the cells beside it
    assert torch.equal(differs.any(-1).any(-1), expected)
    colours = differs[:, :, DIRECTIONS:].any(2)
    assert colours.nonzero().tolist() == [[1, 1, 3]]


def test_edges_are_told_by_their_direction_and_little_by_how_strong_they_are():
    places = torch.arange(16.0)
    across = (places > 5).float().expand(1, 3, 16, 16)  # brighter to the right, in a second cell
    slanted = (places + places[:, None] > 15).float().expand(1, 3, 16, 16)  # and downwards
    edges, weak, other, flat = (
        EdgesAndColours(8)(picture).view(4, DIRECTIONS + COLOURS, 4)
        for picture in (across, across * 0.4, slanted, torch.full((1, 3, 16, 16), 0.5)))
    first = edges[0, :DIRECTIONS, 1]
    assert first.argmax() == 0 and first[DIRECTIONS // 2] < -0.9
    assert torch.allclose(weak[0, :DIRECTIONS, 1], first, atol=0.5)
    turned = EdgesAndColours(8)(across.mT).view(4, DIRECTIONS + COLOURS, 4)
    assert turned[0, :DIRECTIONS, 2].argmax() == DIRECTIONS // 2
    assert other[1, :DIRECTIONS, 2].argmax() == DIRECTIONS // 4
    assert (flat[:, :DIRECTIONS] < -0.9).all() and (flat[:, DIRECTIONS:] == 0.5).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_weights_read_pictures_the_same_to_the_bit(precision):
    plain = create_model("micro", vocab_size=64, max_len=32)
    model = ConditionalTransformer(plain.config, encoder())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_precision(precision).eval()
    with torch.no_grad():
        before = model.encode(some_pictures(3))
        after = model.for_inference().encode(some_pictures(3))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_where_a_patch_stands_is_told_in_two_dimensions():
    """Two patches exchanged are another picture, in rows as in columns, and the rotary turn of two
    places depends on both of their distances."""
    reader = encoder(32)
    turns = torch.complex(reader.cos, reader.sin).view(4, 4, -1)
    pairs = turns.shape[-1]
    assert torch.allclose(turns[2, 1] * turns[1, 1].conj(), turns[1, 1] * turns[0, 1].conj())
    assert torch.allclose(turns[3, 1, pairs // 2:], turns[0, 1, pairs // 2:])
    assert torch.allclose(turns[3, 1, :pairs // 2], turns[3, 2, :pairs // 2])
    nn.init.normal_(reader.blocks[0].attention.out.weight, std=0.1)
    pictures = some_pictures(1, 32)
    exchanged = pictures.clone()
    exchanged[:, :8, :8], exchanged[:, :8, 8:16] = pictures[:, :8, 8:16], pictures[:, :8, :8]
    with torch.no_grad():
        one, other = (reader(batch).states[-1] for batch in (pictures, exchanged))
    assert not torch.allclose(one[0, 0], other[0, 1], atol=1e-3)


def test_no_picture_is_the_denoiser_alone_to_the_bit_whatever_the_pixels():
    torch.manual_seed(0)
    plain = create_model("micro", vocab_size=64, max_len=32).eval()
    model = ConditionalTransformer(plain.config, encoder()).eval()
    model.load_decoder(plain.state_dict())
    tokens = torch.randint(4, 64, (3, 32))
    pictures = some_pictures(3)
    with torch.no_grad():
        expected = plain.hidden(tokens)
        # at first no picture says anything, for every gate is closed
        assert torch.equal(model.hidden(tokens, context=model.encode(pictures)), expected)
        for block in model.blocks:
            nn.init.constant_(block.cross.gate, 0.1)
        seen = model.hidden(tokens, context=model.encode(pictures))
        none = pictures * torch.tensor([1, 1, 1, 0], dtype=torch.uint8)
        assert torch.equal(model.hidden(tokens, context=model.encode(none)), expected)
        dropped = model.encoder.without(pictures, torch.tensor([True, False, True]))
        mixed = model.hidden(tokens, context=model.encode(dropped))
    assert not torch.allclose(seen, expected, atol=1e-3)
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(mixed[1], seen[1])


def test_a_picture_stands_at_no_distance_from_any_token():
    """The same token looks at it alike wherever it stands."""
    torch.manual_seed(0)
    model = ConditionalTransformer(ModelConfig(width=64, heads=2, layers=1, vocab_size=64,
                                               max_len=32), encoder()).eval()
    cross, context = model.blocks[0].cross, model.encode(some_pictures(1))
    nn.init.constant_(cross.gate, 0.1)
    x = torch.randn(1, 1, 64).expand(1, 32, 64)
    with torch.no_grad():
        seen = cross(x, model.view(32), context.keys[0], context.values[0], context.bias)
    torch.testing.assert_close(seen, seen[:, :1].expand_as(seen))


def test_variations_are_those_of_the_seed_and_leave_none_alone():
    pictures = torch.full((6, 32, 32, 4), 255, dtype=torch.uint8)
    pictures[:, 8:24, 8:24, :3] = torch.tensor([200, 30, 30], dtype=torch.uint8)
    pictures[5] = 0
    made, again, other = (varied(pictures, torch.Generator().manual_seed(seed))
                          for seed in (0, 0, 1))
    assert made.dtype == torch.uint8 and made.shape == pictures.shape
    assert torch.equal(made, again) and not torch.equal(made, other)
    assert not made[5].any() and (made[:5, ..., 3] == 255).all()
    inside = (made[:5, ..., 0].int() - made[:5, ..., 1].int()) > 60  # what is red
    sizes = inside.flatten(1).sum(1)
    assert (sizes > 16 * 16 * 0.5).all() and (sizes < 16 * 16 * 1.35).all()
    assert len(set(sizes.tolist())) > 2
    # turned neither over nor round: the left of a picture stays left of its right
    pictures[:5, 8:24, 16:24, :3] = torch.tensor([30, 30, 200], dtype=torch.uint8)
    made = varied(pictures, torch.Generator().manual_seed(3))[:5].int()
    columns = torch.arange(32.0)
    for picture in made:
        red, blue = ((picture[..., a] - picture[..., b] > 60).float().sum(0) for a, b in (
            (0, 2), (2, 0)))
        assert (red * columns).sum() / red.sum() < (blue * columns).sum() / blue.sum()


def test_settings_that_do_not_belong_to_the_weights_are_refused():
    reader = encoder()
    settings, weights = reader.settings(), reader.state_dict()
    again = ENCODERS["image"].restore(settings, weights)
    again.load_state_dict(weights)
    for change in ({"size": 24}, {"patch": 16}, {"size": 2**20}, {"patch": 0}, {"size": "16"},
                   {"config": settings["config"] | {"layers": 9}},
                   {"config": settings["config"] | {"width": 64}}):
        with pytest.raises((KeyError, RuntimeError, TypeError)):
            ENCODERS["image"].restore(settings | change, weights)


# ---- trained, measured and told ------------------------------------------------------------------

def test_only_what_reads_pictures_is_trained(picture_checkpoint, joint_checkpoint):
    run, base = load_checkpoint(picture_checkpoint, None), load_checkpoint(joint_checkpoint, None)
    assert run["kind"] == "conditional_joint" and run["encoder"] == "image"
    for name, weight in run["weights"].items():
        if name in base["weights"]:
            assert torch.equal(weight, base["weights"][name]), name
    model = model_from_checkpoint(run)
    assert isinstance(model.encoder, ImageEncoder)
    assert all(block.cross.gate.any() for block in model.blocks)


def test_it_goes_on_with_adapters_that_it_had_not(picture_checkpoint, joint_checkpoint, picture_dir,
                                                  tmp_path, fails):
    """First encoder and cross-attention alone, then adapters beside them."""
    start = ["--stage", "2", "--objective", "joint", "--data_dir", str(picture_dir), *SHORT,
             "--max_steps", "3"]
    train.main([*start, "--decoder_checkpoint", str(joint_checkpoint), "--checkpoint_dir",
                str(tmp_path / "one")])
    train.main([*start, "--decoder_checkpoint", str(tmp_path / "one/best.pt"), "--checkpoint_dir",
                str(tmp_path / "two"), "--lora_rank", "1"])
    two = load_checkpoint(tmp_path / "two/last.pt", None)
    assert two["model_config"]["lora_rank"] == 1
    assert any(".lora.up." in name and weight.any() for name, weight in two["weights"].items())
    third = [*start, "--decoder_checkpoint", str(picture_checkpoint), "--checkpoint_dir",
             str(tmp_path / "three")]
    assert "has adapters already" in fails(train.main, *third, "--lora_rank", "1")
    # and with those that it had: conditions are dropped for them too
    train.main([*third, "--lora_rank", "2", "--condition_dropout", "0.5"])
    train.main([*third, "--overwrite"])
    three = load_checkpoint(tmp_path / "three/last.pt", None)
    assert three["train_config"]["lora_rank"] == 2 and TrainConfig(
        **three["train_config"]).drops_conditions == 0.1
    before = load_checkpoint(picture_checkpoint, None)["ema"]
    moved = {name for name, weight in three["weights"].items()
             if not torch.equal(weight, before[name])}
    assert moved and all(map(is_of_condition, moved)) and any(".lora." in name for name in moved)


def test_several_pictures_in_one_batch_are_each_told_as_alone(picture_checkpoint, capsys):
    own = ["--checkpoint", str(picture_checkpoint), "--json", "--length", "12", "--temperature",
           "1", "--device", "cpu"]
    told = [*own, "--block_size", "1"]
    images = [str(EMOJI / json.loads(line)["image"]) for line in
              (EMOJI / "pairs.jsonl").read_text().splitlines()[:3]]
    generate.main([*told, "--image", *images])
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    together.sort(key=lambda line: line["row"])
    assert [line["image"] for line in together] == images
    generate.main([*told, "--image", images[0]])
    alone = json.loads(capsys.readouterr().out)
    assert alone["tokens"] == together[0]["tokens"] and alone["guidance"] == 1.0
    for flags in (["--prompt", "Look"], ["--block_size", "4", "--steps", "2"],
                  ["--block_size", "0", "--steps", "3"], ["--guidance", "2"],
                  ["--verify", "--steps", "1", "--block_size", "4"]):
        generate.main([*own, *flags, "--image", *images[:2]])
        assert len(capsys.readouterr().out.splitlines()) == 2, flags


def test_what_is_refused(picture_checkpoint, conditional_checkpoint, tmp_path, fails):
    own = ["--checkpoint", str(picture_checkpoint)]
    assert "give it --image" in fails(generate.main, *own, "--condition", "A cat.")
    assert "--condition" in fails(generate.main, "--checkpoint", conditional_checkpoint, "--image",
                                  CAT)
    assert "nowhere.png" in fails(generate.main, *own, "--image", tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in fails(generate.main, *own, "--image", CAT, tmp_path / "text.png")
    assert "give one of them" in fails(generate.main, *own, "--image", CAT, "--condition", "A cat.")
    assert "--guidance belongs to" in fails(generate.main, *own, "--guidance", "2")
    assert "python evaluate.py condition" in fails(
        evaluate.main, "pictures", "--checkpoint", conditional_checkpoint)


def test_pictures_of_another_size_are_refused(picture_checkpoint, picture_dir, tmp_path, fails,
                                              long_data_dir):
    prep_image_data.main(["--pairs", str(picture_dir.parent / "pairs.jsonl"), "--data_dir",
                          str(long_data_dir), "--output_dir", str(tmp_path / "large"),
                          "--image_size", "24"])
    assert "--image_size 16" in fails(evaluate.main, "pictures", "--checkpoint", picture_checkpoint,
                                      "--data_dir", tmp_path / "large")


def test_its_worth_is_measured(picture_checkpoint, picture_dir, tmp_path, capsys):
    target = tmp_path / "pictures.json"
    evaluate.main(["pictures", "--checkpoint", str(picture_checkpoint), "--data_dir",
                   str(picture_dir), "--output", str(target), "--num_samples", "4", "--device",
                   "cpu", "--precision", "fp32"])
    out, result = capsys.readouterr().out, json.loads(target.read_text())
    value = result["value"]
    assert value["gain_over_none"] == pytest.approx(value["none"] - value["own"])
    assert result["mode"] == "causal" and result["retrieval"]["chance"] == 0.125
    assert len(result["stories"]) == 4 and result["naming"] is None  # nobody said what is shown
    assert "own better than another's" in out
    page = target.with_suffix(".html").read_text()
    assert page.count("data:image/png;base64,") == 4 and target.with_suffix(".png").is_file()


# ---- the measures by hand ------------------------------------------------------------------------

class Known:
    """Pairs of eight subjects twice, whose numbers are their places."""

    def __init__(self):
        self.numbers = list(range(16))
        self.subjects = [[f"thing{i % 8}"] for i in range(16)]
        self.rows = type("Rows", (), {
            "lengths": np.full(16, 5), "data_dir": "here", "split": "val",
            "batch": lambda _, rows: np.array(rows)[:, None]})()
        self.pictures = type("Pictures", (), {"batch": lambda _, rows: np.array(rows)})()

    apart, another, groups = (getattr(measured.Pairs, name)
                              for name in ("apart", "another", "groups"))


class Told:
    """A kind whose text i costs `nats[i]` with no picture, `less` with one of the same subject, and
    `nats[i]` with any other."""

    def __init__(self, less: float):
        self.less, self.nats = less, np.linspace(10, 20, 16)

    def nelbo(self, model, batches, seed, draws, numbers, conditions):
        rows = np.concatenate([batch[:, 0] for batch in batches])
        assert (rows == np.concatenate(numbers)).all()
        nats = self.nats[rows].copy()
        if conditions is not None:
            shown = np.concatenate([conditions(part) for part in numbers])
            nats[shown % 8 == rows % 8] -= self.less
        five = np.full(len(rows), 5.0)
        return Nelbo(rows, five, five, nats, five)


def test_a_picture_that_is_worth_something_is_found_and_one_that_is_not_is_guessed():
    for less, share in ((3.0, 1.0), (-1.0, 0.0)):
        likelihood = measured.Likelihood(Told(less), None, Known(), 1, 0)
        value = measured.value_of_pictures(likelihood, 0)
        assert value["gain_over_none"] == pytest.approx(less / 5)
        assert value["gain_over_another"] == pytest.approx(less / 5)
        assert value["gain_over_none_standard_error"] == pytest.approx(0, abs=1e-9)
        found = measured.retrieval(likelihood, 0)
        assert found["groups"] == 2
        assert found["picture_of_text"]["share"] == found["text_of_picture"]["share"] == share


def test_groups_and_others_show_other_things():
    pairs = Known()
    for group in pairs.groups(0):
        assert len({pairs.subjects[i][0] for i in group}) == 8
    assert all(pairs.subjects[i] != pairs.subjects[j] for i, j in enumerate(pairs.another(3)))


def test_naming_by_hand():
    stories = ["A cat saw two dogs.", "The category.", "Cats ran to a dog."]
    result = measured.naming(stories, [["cat"], ["cat"], ["dog"]])
    assert result["own"] == pytest.approx(2 / 3)
    # story 1 against dog: yes; 2 against dog: no; 3 against the two cats: yes, yes
    assert result["another"] == pytest.approx(3 / 4)
    assert not measured.names("cat", "concatenate") and measured.names("cat", "CATS!")


# ---- an encoder that somebody else has trained ---------------------------------------------------

@pytest.fixture
def vision(tmp_path):
    """A stand-in: mean colours of a grid of 2 x 2, as (N, 4, 3); with `batch` for so many alone."""
    import onnx
    from onnx import TensorProto, helper

    def write(name: str = "vision.onnx", channels: int = 3, batch: int | str = "N", flat=False):
        nodes = [helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[4, 4],
                                  strides=[4, 4]),
                 helper.make_node("Reshape", ["pooled", "shape"], ["cut"]),
                 helper.make_node("Transpose", ["cut"], ["turned"], perm=[0, 2, 1]),
                 helper.make_node("ReduceMean" if flat else "Identity", ["turned"], ["y"],
                                  **({"axes": [1], "keepdims": 0} if flat else {}))]
        graph = helper.make_graph(
            nodes, "vision", [helper.make_tensor_value_info("x", TensorProto.FLOAT,
                                                            [batch, channels, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [helper.make_tensor("shape", TensorProto.INT64, [3], [0, channels, -1])])
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)],
                                    ir_version=8), path)
        return path
    return write


def test_a_frozen_encoder_gives_what_its_graph_says(vision):
    decoder = ModelConfig(width=64, heads=2)
    pictures = torch.full((2, 16, 16, 4), 255, dtype=torch.uint8)
    pictures[0, :8, 8:, :3] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    for batch in ("N", 1):
        reader = FrozenEncoder.from_file(str(vision(batch=batch)), decoder, {"size": 16})
        nn.init.eye_(reader.project.weight)
        with torch.no_grad():
            state, = reader(pictures).states
        assert state.shape == (2, 4, 64) and reader.places(pictures) == 4
        # a red quarter is (1, 0, 0), normalised twice; a white one three alike
        assert state[0, 1, 0] > 4 and abs(float(state[0, 1, 1])) < 0.7
        torch.testing.assert_close(state[1, :, :3], state[1, :, :1].expand(4, 3))
    assert FrozenEncoder.from_file(str(vision(flat=True)), decoder, {"size": 16}).count == 1


def test_it_is_trained_beside_and_kept_in_the_checkpoint(vision, joint_checkpoint, picture_dir,
                                                         tmp_path, capsys, fails):
    from training import slim
    start = ["--stage", "2", "--objective", "joint", "--decoder_checkpoint", str(joint_checkpoint),
             "--data_dir", str(picture_dir), *SHORT, "--max_steps", "3"]
    path = vision()
    train.main([*start, "--checkpoint_dir", str(tmp_path / "run"), "--image_encoder", str(path)])
    content = path.read_bytes()
    path.unlink()  # nobody needs it any more
    run = load_checkpoint(tmp_path / "run/best.pt", None)
    assert run["encoder"] == "image_frozen"
    model = model_from_checkpoint(run)
    assert model.encoder.graph.numpy().tobytes() == content
    slim.main(["--adapter", "--checkpoint", str(tmp_path / "run/best.pt"), "--output",
               str(tmp_path / "adapter.pt")])
    shutil.copy(joint_checkpoint, tmp_path / "base.pt")
    told = ["--image", str(CAT), "--json", "--length", "8", "--block_size", "1", "--device", "cpu"]
    capsys.readouterr()
    generate.main(["--checkpoint", str(tmp_path / "run/best.pt"), *told])
    generate.main(["--checkpoint", str(tmp_path / "adapter.pt"), *told])
    assert len(capsys.readouterr().out.splitlines()) == 2
    train.main(["--resume", "--checkpoint_dir", str(tmp_path / "run"), "--max_steps", "4"])
    for error, name, content in (("name the .onnx file", "nowhere.onnx", None),
                                 ("no graph", "text.onnx", b"no graph")):
        if content:
            (tmp_path / name).write_bytes(content)
        assert error in fails(train.main, *start, "--checkpoint_dir", tmp_path / "x",
                              "--image_encoder", tmp_path / name)
    assert "not pictures" in fails(train.main, *start, "--checkpoint_dir", tmp_path / "x",
                                   "--image_encoder", vision("grey.onnx", channels=1))
    assert "encoder already" in fails(
        train.main, *start, "--checkpoint_dir", tmp_path / "x", "--image_encoder", vision(),
        "--decoder_checkpoint", tmp_path / "run/best.pt")
    assert "give one of them" in fails(
        train.main, *start, "--checkpoint_dir", tmp_path / "x", "--image_encoder", vision(),
        "--encoder_config", "micro")


def test_words_are_not_for_it(vision, checkpoint, pairs_dir, tmp_path, fails):
    assert "has no pictures" in fails(
        train.main, "--stage", "2", "--decoder_checkpoint", checkpoint, "--data_dir", pairs_dir,
        "--checkpoint_dir", tmp_path / "x", "--image_encoder", vision(), *SHORT)
