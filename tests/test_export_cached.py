"""The graph behind a cache: the same stories as the joint checkpoint's, without torch."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from test_export_jetson import run_in

import generate
from corpus.tokens import BOS, EOS
from export_jetson import main
from jetson.engine_runtime import Bundle, OnnxSession
from jetson.graphs import operators
from jetson.reader import GraphReader, HostSlots
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from network.attention import HIDDEN
from sampling.cached import CachedModel
from sampling.drawing import distribution
from sampling.left_to_right import rows_of, write_blocks, write_causal, write_verified
from sampling.sampler import ORDERS, REMASKS, Sampler

STARTS = [np.array(start) for start in (
    [BOS], [BOS, 40, 41], [BOS, 50], [BOS, 60], [BOS], [BOS, 70], [BOS, 80], [BOS])]
ENDING = Sampler(), Sampler(steps=3)  # those with which some of them end


@pytest.fixture(scope="session")
def joint_model(joint_checkpoint):
    return model_from_checkpoint(load_checkpoint(joint_checkpoint, kind="joint")).for_inference()


def written(reader, sampler, mode, longest=60, starts=STARTS):
    if mode == "causal":
        pieces = write_causal(reader, starts, sampler, longest, seed=3)
    elif mode == "verified":
        pieces = write_verified(reader, reader, starts, sampler, 5, longest, seed=3)
    else:
        pieces = write_blocks(reader, starts, sampler, int(mode), longest, seed=3)
    return [row.tolist() for row in rows_of(pieces, starts)]


CASES = [
    ("causal", Sampler()), ("causal", Sampler(top_k=9, top_p=0.8)),
    ("causal", Sampler(temperature=0.0)),
    *(("4", Sampler(steps=3, order=order)) for order in ORDERS),
    ("4", Sampler(steps=4, remask=REMASKS[1], eta=0.4)), ("8", Sampler(steps=3, pace="linear")),
    ("4", Sampler(steps=4, pace="first_hitting", top_p=0.9)),
    ("4", Sampler(steps=2, temperature=0.0)),
    ("verified", Sampler(steps=0)), ("verified", Sampler(steps=0, top_p=0.9)),
    ("verified", Sampler(steps=1)), ("verified", Sampler(steps=2, top_p=0.9)),
    ("verified", Sampler(steps=3))]


@pytest.mark.parametrize(("mode", "sampler"), CASES)
def test_the_same_stories_as_torch(joint_bundle, joint_model, mode, sampler):
    longest = 100 if mode == "verified" else 60
    got = written(Bundle(joint_bundle / "step_fp32.onnx").reader(sampler), sampler, mode, longest)
    assert got == written(CachedModel(joint_model, sampler), sampler, mode, longest)
    assert all(row[:len(start)] == start.tolist() and len(row) > len(start)
               for row, start in zip(got, STARTS, strict=True))
    assert sampler not in ENDING or any(
        row[-1] == EOS and len(row) < longest for row in got)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 8])
def test_logits_and_new_keys_are_those_of_torch(joint_bundle, joint_model, count):
    """With slots that hold something, of which some are hidden."""
    session = OnnxSession(joint_bundle / "cached_fp32.onnx")
    shape, _ = session.inputs["keys"]
    rng = np.random.default_rng(count)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, 300, (1, count)).astype(np.int32)
    positions = np.arange(5, 5 + count, dtype=np.int32)[None] - 6
    mask = np.where(rng.random((1, 1, count, shape[3] + count)) < 0.3, 0, HIDDEN).astype(np.float32)
    got = session.run(dict(tokens=tokens, positions=positions, mask=mask, keys=keys, values=values))
    kept = []
    hidden = joint_model.hidden(
        torch.from_numpy(tokens).long(), kept=kept, view=joint_model.view(
            torch.from_numpy(positions), torch.from_numpy(mask), causal=False),
        known=list(zip(torch.from_numpy(keys), torch.from_numpy(values), strict=True)))
    expected = joint_model.head(hidden, (0, 3)).numpy()
    np.testing.assert_allclose(got[0], np.maximum(expected, HIDDEN), atol=1e-4)
    np.testing.assert_allclose(got[1], hidden, atol=1e-5)
    assert (got[0][..., 1:3] == HIDDEN).all()
    for new, pairs in zip(got[2:], zip(*kept, strict=True), strict=True):
        np.testing.assert_allclose(new, torch.stack(pairs).numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_precisions_stay_near(joint_bundle, joint_model, precision):
    reader = Bundle(joint_bundle / f"cached_{precision}.onnx").reader(Sampler())
    exact = CachedModel(joint_model, Sampler())
    tokens = np.random.default_rng(0).integers(4, 300, (2, 40))
    for one in (reader, exact):
        one.begin(np.arange(2))
    p, q = (distribution(one.read(tokens, logits=40), Sampler()) for one in (reader, exact))
    apart = np.abs(p - q).sum(-1).mean() / 2
    assert 0 < apart < (0.02 if precision == "fp16" else 0.2)
    assert written(reader, Sampler(steps=2), "verified")
    graph = onnx.load(joint_bundle / f"cached_{precision}.onnx")
    types = {x.name: x.type.tensor_type.elem_type for x in (*graph.graph.input,
                                                            *graph.graph.output)}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {types[name] for name in ("keys", "values", "new_keys", "new_values")} == {half}
    assert types["logits"] == types["hidden"] == types["mask"] == whole
    quantised = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    assert quantised == (14 if precision == "int8" else 0)


def test_a_story_without_end(joint_bundle, joint_model):
    """The ring goes round; a token sees as far back as in torch, and drafts are forgotten."""
    bundle, sampler = Bundle(joint_bundle / "cached_fp32.onnx"), Sampler(steps=1)
    start = [np.array([2, *np.random.default_rng(1).integers(4, 300, 235)])]
    for mode in ("causal", "verified"):
        rows = [written(one, sampler, mode, 700, start) for one in (
            bundle.reader(sampler), CachedModel(joint_model, sampler))]
        assert rows[0] == rows[1]
    reader, exact = bundle.reader(sampler), CachedModel(joint_model, sampler)
    tokens = np.random.default_rng(2).integers(4, 300, (1, 600))
    for one in (reader, exact):
        one.begin(np.arange(1))
    a, b = (one.read(tokens, logits=600) for one in (reader, exact))
    np.testing.assert_allclose(a, b, atol=2e-4)
    block = np.full((1, 8), 1)
    np.testing.assert_allclose(reader.look(block, np.arange(8)), exact.look(block, np.arange(8)),
                               atol=2e-4)
    reader.forget(np.array([592]))
    with pytest.raises(ValueError, match="overwritten"):
        reader.forget(np.array([500]))
    with pytest.raises(ValueError, match="the graph takes 8 at most"):
        reader.look(np.ones((1, 9), np.int64), np.arange(9))


def test_more_rows_than_the_graph_takes(joint_pairs_bundle, joint_model):
    """Groups of two: rows of different lengths in one, and rows that leave."""
    bundle = Bundle(joint_pairs_bundle / "step_fp32.onnx")
    for mode, sampler in (("verified", Sampler(steps=2)), ("causal", Sampler()),
                          ("4", Sampler(steps=2))):
        reader = bundle.reader(sampler)
        assert reader.batch == 2
        assert written(reader, sampler, mode) == written(CachedModel(joint_model, sampler),
                                                         sampler, mode)


def test_what_bundle_json_says_of_it(joint_bundle, capsys):
    contents = json.loads((joint_bundle / "bundle.json").read_text())
    assert contents["kind"] == "joint" and contents["cached"] == {"slots": 272, "tokens": 8}
    assert set(contents["files"]) == {"draft_head", *(
        f"{graph}{precision}" for graph in ("", "cached_") for precision in ("fp32", "fp16", "int8")
    )}
    reports = {name: contents["reports"][f"cached_{name}"] for name in ("fp32", "fp16", "int8")}
    assert reports["fp32"]["max_log_p_difference"] < 1e-3
    assert reports["fp32"]["nll"] == pytest.approx(reports["fp32"]["nll_torch_fp32"], abs=1e-5)
    assert reports["fp32"]["block_kl"] < 1e-6 < reports["int8"]["block_kl"] < 0.2
    assert reports["fp32"]["block_kl"] < reports["fp16"]["block_kl"] < reports["int8"]["block_kl"]
    assert reports["int8"]["nll"] == pytest.approx(reports["fp32"]["nll"], rel=0.02)
    for name, report in reports.items():
        assert operators(onnx.load(joint_bundle / f"cached_{name}.onnx")) == report["operators"]


WORDS = {
    "nothing": "", "causal": "--block_size 1", "blocks": "--block_size 4 --steps 3",
    "verified": "--verify --steps 1",
    "other drafts": "--verify --block_size 6 --steps 2 --top_k 80 --top_p 0.9"}


@pytest.mark.parametrize("mode", WORDS.values(), ids=WORDS)
def test_the_command_line_tells_the_stories_of_the_checkpoint(joint_bundle, joint_checkpoint, mode,
                                                              capsys):
    """The prompt ends inside a word, which both complete; the batches differ."""
    def told(*source: object) -> tuple[list[dict], str]:
        generate.main([*map(str, source), *mode.split(), "--prompt", "Tom had a fri", "--json",
                       "--num_samples", "3", "--stream", "--length", "50"])
        text, error = capsys.readouterr()
        lines = [json.loads(line) for line in text.splitlines()]
        return [{**line, "checkpoint": None} for line in lines], error
    expected, _ = told("--checkpoint", joint_checkpoint)
    for name in ("step_fp32.onnx", "cached_fp32.onnx"):
        got, error = told("--onnx", joint_bundle / name)
        assert got == expected and "warning" not in error
    stories = [line for line in expected if "nfe" in line]
    assert len(stories) == 3 and len(expected) > 9
    assert all(story["text"].startswith("Tom had a fri") for story in stories)


def test_a_copied_bundle_writes_from_the_left_without_torch(joint_bundle, joint_checkpoint, capsys):
    words = "--verify --stream --num_samples 2 --length 40 --prompt Tom".split()
    done = run_in(joint_bundle, "--onnx", "cached_fp32.onnx", *words)
    assert done.returncode == 0, done.stderr
    generate.main(["--checkpoint", str(joint_checkpoint), *words])
    told, line = done.stdout.rsplit("\n", 2)[:2]
    expected, same_line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert told == expected and told.count("---\nTom") == 2
    assert line.split(", ")[:2] == same_line.split(", ")[:2] and "tokens a round" in line
    assert "generate.py --engine cached_fp16.engine --verify" in (
        joint_bundle / "README.md").read_text()


@pytest.mark.parametrize("mode", ["causal", "4", "verified"])
def test_no_row_is_no_story(joint_model, mode):
    assert written(CachedModel(joint_model, Sampler()), Sampler(), mode, starts=[]) == []


# ---- mistakes ------------------------------------------------------------------------------------

def test_what_the_graph_cannot_do(joint_bundle, fails):
    def told(path, *args, **settings) -> str:
        return fails(lambda argv: Bundle(path).reader(Sampler(**settings), *args))
    step = joint_bundle / "step_fp32.onnx"
    assert "--pace threshold is not there" in told(step, pace="threshold")
    assert "takes no condition" in told(step, np.zeros((1, 4), np.int64))
    assert "is no unmasking step" in fails(lambda argv: Bundle(
        joint_bundle / "cached_fp32.onnx").step(Sampler()))


@pytest.mark.parametrize(("words", "message"), [
    ("--block_size 9", "a pass of 9 tokens; "),
    ("--block_size 9 --length 400", "a pass of 9 tokens; "),
    ("--verify --block_size 16", "a pass of 16 tokens; "),
    ("--block_size 4 --pace threshold", "--pace threshold is not there"),
    ("--block_size 4 --pace entropy_bound", "--pace entropy_bound is not there"),
    ("--verify --condition Tom.", "joint model; what is needed here"),
    ("--verify --verify_with x.pt", "--verify_with: needs the --checkpoint"),
    ("--verify --precision fp16", "--precision: an exported step has its own"),
    ("--verify --infill a[MASK]", "--infill: needs the whole row"),
    ("--stream --steps 4", "--stream: text stands when its row does")])
def test_what_the_command_line_cannot_do(joint_bundle, words, message, fails):
    for name in ("step_fp32.onnx", "cached_fp32.onnx"):
        path = joint_bundle / name
        assert message.format(path) in fails(generate.main, "--onnx", path, *words.split())


def test_whole_rows_need_the_step(joint_bundle, fails, capsys):
    for words in (["--steps", "4"], ["--block_size", "0"], ["--infill", "Tom [MASK:2] ran."]):
        assert "is no unmasking step" in fails(generate.main, "--onnx", joint_bundle /
                                               "cached_fp32.onnx", *words)
    assert "--heal: an exported step" in fails(generate.main, "--onnx", joint_bundle /
                                               "step_fp32.onnx", "--steps", "4", "--heal")
    generate.main(["--onnx", str(joint_bundle / "step_fp32.onnx"), "--steps", "2"])
    assert "--- 3 ---" in capsys.readouterr().out


def test_a_bundle_that_fills_whole_rows_alone(joint_bundle, tmp_path, fails):
    for path in joint_bundle.iterdir():
        if path.suffix in (".json", ".onnx"):
            shutil.copy(path, tmp_path)
    contents = json.loads((tmp_path / "bundle.json").read_text())
    step = tmp_path / "step_fp32.onnx"

    def told(cached: dict | None, main, *words: str) -> str:
        (tmp_path / "bundle.json").write_text(json.dumps({**contents, "cached": cached}))
        return fails(main, *words)
    assert "joint model, which fills whole rows alone" in told(
        None, lambda argv: Bundle(step).reader(Sampler()))
    assert f"--verify: {step} does not write from the left" in told(
        None, generate.main, "--onnx", str(step), "--verify")
    assert "cached_fp32.onnx is not the graph behind a cache" in told(
        {"slots": 288, "tokens": 8}, generate.main, "--onnx", str(step), "--verify")


def test_a_missing_graph_is_named(joint_bundle, tmp_path, fails):
    for name in ("bundle.json", "tokenizer.json", "step_fp32.onnx"):
        (tmp_path / name).write_bytes((joint_bundle / name).read_bytes())
    bundle = Bundle(tmp_path / "step_fp32.onnx")
    assert "cached_fp32.onnx is missing" in fails(lambda argv: bundle.reader(Sampler()))
    contents = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps({**contents, "cached": {"slots": 0}}))
    assert "is damaged (cached)" in fails(lambda argv: Bundle(tmp_path / "step_fp32.onnx"))


def test_the_reader_needs_no_more_of_a_session_than_its_inputs(joint_bundle):
    """The empty batch costs no memory."""
    session = OnnxSession(joint_bundle / "cached_fp32.onnx")
    slots = HostSlots(session)
    GraphReader(slots, Sampler(), 256, 8)
    assert slots.keys == []


def test_the_graphs_compile_for_nvidia(joint_bundle, capsys):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    main(["--check", "rtx", "--out_dir", str(joint_bundle)])
    assert capsys.readouterr().out.count("no warning") == 6
