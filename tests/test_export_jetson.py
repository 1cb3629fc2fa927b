"""Exported steps: the same stories as the checkpoint's, without torch."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, python
from toys import HalfMasked, PlacedTransformer

import export_jetson
import generate
from corpus.conditions import condition_row
from export_jetson import main
from jetson import bundle as bundle_module
from jetson import graphs, report
from jetson.bundle import SCRIPTS
from jetson.engine_runtime import Bundle, OnnxSession
from jetson.graphs import operators, step_inputs, to_onnx
from jetson.int8 import LEVELS, balance, best_scale, block_products, quantize
from jetson.step_graph import DeviceStep
from kinds import registry
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from model import MODEL_CONFIGS, ConditionalTransformer, DiffusionTransformer
from network.encoders import TextEncoder
from network.layers import ModelConfig
from sampling.loop import unmask_rows
from sampling.rows import blank_story
from sampling.sampler import ORDERS, PRESETS, REMASKS, Sampler
from sampling.step import numpy_step

ROWS = [blank_story(20), blank_story(40), blank_story(37)]


@pytest.fixture(scope="session")
def told_bundle(conditional_checkpoint, once):
    return once("told", lambda folder: main([
        "--checkpoint", str(conditional_checkpoint), "--out_dir", str(folder), "--guided",
        "--report_rows", "3", "--calibration_rows", "3", "--batch", "2", "--precisions", "fp32",
        "int8"]))


def stories(step, sampler: Sampler, rows=ROWS) -> list[list[list[int]]]:
    """The tokens after every step, as lists."""
    return [state.tokens.tolist() for _, state in unmask_rows(step, rows, sampler, seed=4)]


SAMPLERS = [
    *(Sampler(steps=5, order=order) for order in ORDERS),
    *(Sampler(steps=5, remask=remask, eta=0.3) for remask in REMASKS[1:]),
    Sampler(steps=5, pace="linear", temperature=0.0), Sampler(steps=5, top_p=0.7, top_k=9),
    Sampler(steps=9, pace="threshold", threshold=0.02, order="confidence", temperature=0.7),
    Sampler(steps=30, pace="first_hitting"), Sampler(steps=5, top_k=1)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_by_step_the_same_as_torch(bundle, sharp_checkpoint, sampler):
    model = model_from_checkpoint(load_checkpoint(sharp_checkpoint)).for_inference()
    exported = Bundle(bundle / "step_fp32.onnx")
    settings = sampler if sampler.top_k else Sampler(**{**vars(sampler), "top_k": 64})
    assert stories(exported.step(sampler), sampler) == stories(numpy_step(model, settings),
                                                               settings)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_conditions_too(told_bundle, conditional_checkpoint, guidance):
    model = model_from_checkpoint(load_checkpoint(conditional_checkpoint, kind="conditional"))
    exported = Bundle(told_bundle / "step_fp32.onnx")
    told = np.stack([condition_row(ids, exported.condition_len) for ids in (
        [10], [20, 21, 22], [30, 31])])
    told[2] = 0  # none
    sampler = Sampler(steps=5, top_k=64, guidance=guidance)
    a = stories(exported.step(sampler, told), sampler)
    assert a == stories(numpy_step(model.for_inference(), sampler, told), sampler)
    assert (a == stories(exported.step(sampler), sampler)) == (guidance == 0)


def test_both_sides_of_a_guided_step_are_quantised(told_bundle):
    """The network stands in it twice, its weights once."""
    reports = json.loads((told_bundle / "bundle.json").read_text())["reports"]
    assert reports["int8"]["nelbo"] == pytest.approx(reports["fp32"]["nelbo"], rel=0.05)
    graph = onnx.load(told_bundle / "step_int8.onnx").graph
    names = [name for node in graph.node for name in node.output]
    assert len(names) == len(set(names))
    weights = [x for x in graph.initializer if x.data_type == onnx.TensorProto.INT8
               and len(x.dims) == 2]
    assert len(weights) == 2 * (7 + 2)  # two layers; query and output of the cross-attention
    quantised = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert quantised > 2 * (7 + 2) + 6  # what both sides share stands there once
    constants = {x.name for x in graph.initializer}
    left = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    # sums over the likeliest tokens, as products; and the gates of heads, in the first block once
    assert len(left) == 2 + 3


def test_weights_that_both_sides_share_are_found_where_they_are_turned():
    """From some size on the exporter does not turn a weight itself that is used twice."""
    config = ModelConfig(width=128, heads=2, layers=2, vocab_size=300, max_len=32)
    torch.manual_seed(0)
    model = ConditionalTransformer(config, TextEncoder(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.for_inference()
    graph = to_onnx(DeviceStep(model, guided=True), step_inputs(model, 1, 32),
                    ["new_tokens", "confidence"])
    assert any(node.op_type == "Transpose" and node.input[0].startswith("model.blocks")
               for node in graph.graph.node)
    quantize(graph, model, dict.fromkeys(block_products(model), 0.1))
    onnx.checker.check_model(graph)
    assert sum(x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 2
               for x in graph.graph.initializer) == 2 * (7 + 2)
    assert not any(x.name.startswith("model.blocks") and len(x.dims) == 2
                   for x in graph.graph.initializer)


def test_a_kind_of_another_name_is_exported(sharp_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.KINDS, HalfMasked.name, HalfMasked)
    source = load_checkpoint(sharp_checkpoint)
    model = PlacedTransformer(ModelConfig(**source["model_config"]))
    model.load_state_dict(source["weights"], strict=False)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.places, std=0.5)
    save_checkpoint(tmp_path / "toy.pt", model, source["tokenizer"], source["length_histogram"],
                    kind=HalfMasked.name)
    main(["--checkpoint", str(tmp_path / "toy.pt"), "--out_dir", str(tmp_path / "bundle"),
          "--precisions", "fp32", "--report_rows", "0"])
    exported, sampler = Bundle(tmp_path / "bundle" / "step_fp32.onnx"), Sampler(steps=5, top_k=64)
    assert (exported.kind, exported.conditional) == ("half_masked", False)
    assert stories(exported.step(sampler), sampler) == stories(
        numpy_step(model.for_inference(), sampler), sampler)


def test_a_joint_model_with_a_condition_has_its_step_alone(conditional_checkpoint, tmp_path, fails,
                                                           capsys):
    """What a cached graph wrote would not follow from the condition."""
    source = load_checkpoint(conditional_checkpoint, kind="conditional")
    save_checkpoint(tmp_path / "joint.pt", model_from_checkpoint(source), source["tokenizer"],
                    source["length_histogram"], kind="conditional_joint")
    main(["--checkpoint", str(tmp_path / "joint.pt"), "--out_dir", str(tmp_path / "bundle"),
          "--precisions", "fp32", "--report_rows", "0"])
    step, words = tmp_path / "bundle" / "step_fp32.onnx", ["--condition", "Tom ran."]
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["cached"] is None
    assert "does not write from the left" in fails(generate.main, "--onnx", step, "--verify",
                                                   *words)
    generate.main(["--onnx", str(step), "--steps", "2", *words])
    assert capsys.readouterr().out.count("---\nTom ran.") == 3


def test_open_shapes_of_a_single_row(sharp_checkpoint, tmp_path):
    main(["--checkpoint", str(sharp_checkpoint), "--out_dir", str(tmp_path / "bundle"), "--dynamic",
          "--precisions", "fp32", "--report_rows", "0", "--length", "32"])
    exported, sampler = Bundle(tmp_path / "bundle" / "step_fp32.onnx"), Sampler(steps=3, top_k=64)
    model = model_from_checkpoint(load_checkpoint(sharp_checkpoint)).for_inference()
    rows = [blank_story(9), blank_story(30)]
    assert stories(exported.step(sampler), sampler, rows) == stories(
        numpy_step(model, sampler), sampler, rows)


def test_one_graph_for_any_shape(dynamic_bundle, conditional_checkpoint):
    model = model_from_checkpoint(load_checkpoint(conditional_checkpoint, kind="conditional"))
    exported = Bundle(dynamic_bundle / "step_fp32.onnx")
    assert exported.session.inputs["tokens"][0] == [None, None]
    told = np.stack([condition_row([20 + i], exported.condition_len) for i in range(7)])
    rows = [*ROWS, *(blank_story(length) for length in (21, 22, 200, 9))]
    sampler = Sampler(steps=4, top_k=64)
    assert stories(exported.step(sampler, told), sampler, rows) == stories(
        numpy_step(model.for_inference(), sampler, told), sampler, rows)


def test_reports_are_of_the_very_graphs(bundle):
    contents = json.loads((bundle / "bundle.json").read_text())
    reports = contents["reports"]
    assert reports["fp32"]["max_logit_difference"] < 1e-4
    assert reports["fp32"]["nelbo"] == pytest.approx(reports["fp32"]["nelbo_torch_fp32"], abs=1e-5)
    assert 0 < reports["fp16"]["max_logit_difference"] < 0.05
    assert reports["int8"]["nelbo"] == pytest.approx(reports["fp32"]["nelbo"], rel=0.02)
    assert reports["int8"]["max_logit_difference"] > reports["fp16"]["max_logit_difference"]
    for precision, line in reports.items():
        graph = onnx.load(bundle / f"step_{precision}.onnx")
        assert [output.name for output in graph.graph.output] == ["new_tokens", "confidence"]
        assert operators(graph) == line["operators"]
        quantised = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
        assert quantised == (14 if precision == "int8" else 0)  # two layers of seven products
        kinds = {x.data_type for x in graph.graph.initializer if len(x.dims) == 2}
        assert (onnx.TensorProto.FLOAT16 in kinds) == (precision != "fp32")
        # softmax and the means of the norms are in FP32 whatever the precision
        types = {value.name: value.type.tensor_type.elem_type
                 for value in onnx.shape_inference.infer_shapes(graph).graph.value_info}
        for node in graph.graph.node:
            if node.op_type in ("Softmax", "ReduceMean"):
                assert types[node.output[0]] == onnx.TensorProto.FLOAT
    assert contents["licence"] and contents["kind"] == "diffusion"
    assert contents["presets"] == PRESETS


@pytest.mark.parametrize("judged", ["test", "val"])
def test_int8_is_not_calibrated_on_what_it_is_judged_on(pairs_dir, conditional_checkpoint, judged,
                                                        tmp_path, monkeypatch, capsys):
    """The rows themselves are compared, not what is said of them."""
    data = shutil.copytree(pairs_dir, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    splits = meta["splits"]
    if judged == "test":  # the validation split is then neither the one nor the other
        splits |= {"test": splits["val"], "test_condition": splits["val_condition"],
                   "val": splits["train"], "val_condition": splits["train_condition"]}
        (data / "meta.json").write_text(json.dumps(meta))
    used = {}
    real_step, real_compare = graphs.step_graph, report.compare

    def step_graph(config, checkpoint, precision, length, calibration, condition_len):
        used["calibrated"] = calibration
        return real_step(config, checkpoint, precision, length, calibration, condition_len)

    def compare(session, reference, noisy, condition_len):
        used["judged"] = noisy
        return real_compare(session, reference, noisy, condition_len)
    monkeypatch.setattr(bundle_module, "step_graph", step_graph)
    monkeypatch.setattr(bundle_module, "compare", compare)
    main(["--checkpoint", str(conditional_checkpoint), "--data_dir", str(data), "--out_dir",
          str(tmp_path / "bundle"), "--report_rows", "9999", "--calibration_rows", "4",
          "--precisions", "int8"])

    def texts(items) -> set[tuple]:  # with its condition a row is one of its kind
        return {tuple(clean) + tuple(told[0]) for clean, _, _, _, _, told in items}
    calibrated, tested = (texts(used[name].items) for name in ("calibrated", "judged"))
    assert len(calibrated) == 4 and len(tested) > 10 and not calibrated & tested
    contents = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert (contents["judged_on"], contents["calibrated_on"]) == (judged, "train")
    assert contents["reports"]["int8"]["rows"] == len(used["judged"].items)
    text = capsys.readouterr().out
    assert f"rows of {judged}\n" in text and "scales are from 4 rows of train\n" in text


def run_in(folder, *argv, blocked=("torch",), script="generate.py"):
    """A script in a bundle, in a process in which importing these modules fails."""
    code = ("import sys\n"
            f"for name in {blocked!r}: sys.modules[name] = None\n"
            f"sys.argv = [{script!r}, *{list(map(str, argv))!r}]\n"
            "sys.path.insert(0, '')\n"
            f"import runpy; runpy.run_path({script!r}, run_name='__main__')")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(python("-c", code), cwd=folder, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("words", [
    ["--num_samples", "2", "--steps", "4"], ["--prompt", "Once upon a time", "--steps", "4"],
    ["--infill", "Tom had a [MASK:6] and he was [MASK:2].", "--preset", "fast"]])
def test_a_copied_bundle_tells_the_stories_of_the_checkpoint_without_torch(
        bundle, sharp_checkpoint, tmp_path, words, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    done = run_in(copy, "--onnx", "step_fp32.onnx", "--json", *words)
    assert done.returncode == 0, done.stderr
    # without healing, for which a step would have to give its probabilities
    generate.main(["--checkpoint", str(sharp_checkpoint), "--json", "--top_k", "64", "--no-heal",
                   *words])
    told, expected = ([json.loads(line)["text"] for line in text.splitlines()]
                      for text in (done.stdout, capsys.readouterr().out))
    assert told == expected and len(told) >= 2


@pytest.mark.parametrize(("words", "cut"), [
    (["--prompt", "Tom had a fri"], "--prompt: 'fri' is cut"),
    (["--prompt", "Tom had a friend"], None), (["--prompt", "Tom had a fri "], None),
    (["--prompt", "Tom had a fri", "--no-heal"], None),
    (["--infill", "Tom had [MASK:2]end and a fri[MASK:2]."], "--infill: 'end' is cut"),
    (["--infill", "Tom had a fri[MASK:2]."], "--infill: 'fri' is cut"),
    (["--infill", "Tom [MASK:2] ran [MASK:2]."], None), ([], None)])
def test_an_exported_step_names_the_word_that_it_does_not_complete(bundle, words, cut, capsys):
    generate.main(["--onnx", str(bundle / "step_fp32.onnx"), "--num_samples", "1", "--steps", "1",
                   "--json", *words])
    told, error = capsys.readouterr()
    assert error.count("warning") == (cut is not None) and (cut or "") in error
    assert len(told.splitlines()) == 1


def test_what_a_copied_bundle_has_not_is_said(bundle, tmp_path):
    """An export, and the benchmarks that need torch, on the device."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    for words, expected in ((["export_jetson.py"], "torch and onnx"),
                            (["benchmark.py", "train"], "train is not in this folder"),
                            (["benchmark.py", "roofline"], "roofline is not in this folder"),
                            (["benchmark.py"], "say which")):
        code = ("import sys\nfor name in ('torch', 'onnx'): sys.modules[name] = None\n"
                f"sys.argv = {words!r}\nimport importlib.util, runpy\n"
                "there = importlib.util.find_spec\n"
                "importlib.util.find_spec = lambda name, *more: None if name in ('torch', 'onnx') "
                f"else there(name, *more)\nrunpy.run_path({words[0]!r}, run_name='__main__')")
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(python("-c", code), cwd=copy, capture_output=True, text=True, env=env)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert expected in done.stderr


def test_conditions_without_torch(told_bundle, conditional_checkpoint, capsys):
    words = ["--condition", "Lily found a key.", "--guidance", "1.5", "--steps", "4", "--json"]
    done = run_in(told_bundle, "--onnx", "step_fp32.onnx", *words)
    assert done.returncode == 0, done.stderr
    generate.main(["--checkpoint", str(conditional_checkpoint), "--top_k", "64", *words])
    told, expected = ([json.loads(line)["text"] for line in text.splitlines()]
                      for text in (done.stdout, capsys.readouterr().out))
    assert told == expected


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".py")])
def test_the_scripts_of_a_bundle_are_python_3_10_without_torch(script):
    tree = ast.parse((ROOT / script).read_text(), feature_version=(3, 10))
    at_the_top = {name.name if isinstance(node, ast.Import) else node.module
                  for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
                  for name in node.names}
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))}
    copied = {".".join(Path(name).with_suffix("").parts) for name in SCRIPTS}
    assert at_the_top & ours <= copied
    assert not at_the_top & {"torch", "onnx", "onnxruntime", "datasets", "matplotlib"}


def test_a_real_size_becomes_a_graph_that_tensorrt_reads():
    model = DiffusionTransformer(MODEL_CONFIGS["small"]).set_precision("fp16").for_inference()
    graph = to_onnx(DeviceStep(model), step_inputs(model, 1, 256), ["new_tokens", "confidence"])
    assert operators(graph)


@pytest.mark.parametrize("size", list(MODEL_CONFIGS)[2:])
def test_every_size_exports(size):
    """The shapes of the larger ones alone: their weights are not made."""
    with torch.device("meta"):
        model = DiffusionTransformer(MODEL_CONFIGS[size]).set_precision("fp16").half().eval()
        inputs = step_inputs(model, 1, 256)
    inputs["noise"] = inputs["noise"].float()
    inputs["options"] = torch.zeros(6, device="meta")
    program = torch.export.export(DeviceStep(model), tuple(inputs.values()), strict=False)
    tokens, confidence = program.graph.output_node().args[0]
    assert tokens.meta["val"].shape == confidence.meta["val"].shape == (1, 256)


def test_scales_serve_most_values():
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(size=10_000)).astype(np.float32)
    values[0] = 1000.0
    scale = best_scale(values[1:], 1000.0)
    assert scale * LEVELS < 60 and best_scale(values[1:], float(values[1:].max())) * LEVELS > 2


def test_balancing_changes_the_weights_and_not_the_function(sharp_checkpoint):
    model = model_from_checkpoint(load_checkpoint(sharp_checkpoint))
    tokens = torch.randint(4, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected, seen = model(tokens).detach(), []
    model.blocks[0].down.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().abs().flatten(0, 1).amax(0)))
    balance(model, [lambda: model(tokens)])
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 4 and "blocks.0.attention.query.weight" not in changed
    first, last = seen[0], seen[-1]  # channels are more alike than before
    assert (last.max() / last.median()) < (first.max() / first.median())


def test_every_block_product_is_quantised(sharp_checkpoint):
    model = model_from_checkpoint(load_checkpoint(sharp_checkpoint))
    assert len(block_products(model)) == 14


# ---- mistakes ------------------------------------------------------------------------------------

def test_an_export_needs_torch_and_onnx(sharp_checkpoint, monkeypatch, tmp_path, fails):
    monkeypatch.setattr(export_jetson, "find_spec", lambda name: None)
    assert "here give --build_engine" in fails(main, "--checkpoint", sharp_checkpoint, "--out_dir",
                                               tmp_path / "bundle")


@pytest.mark.parametrize(("words", "message"), [
    (["--pace", "entropy_bound"], "--pace entropy_bound needs the entropy"),
    (["--order", "left", "--left_share", "0.3"], "--left_share: an exported step has not"),
    (["--top_k", "65"], "among the 64 likeliest"),
    (["--device", "cpu"], "--device: an exported step has its own"),
    (["--heal", "--prompt", "Tom"], "--heal: an exported step gives no probabilities"),
    (["--condition", "Tom ran."], "diffusion model; what is needed here"),
    (["--checkpoint", "x.pt"], "--checkpoint and --onnx: give one")])
def test_what_an_exported_step_cannot_do(bundle, words, message, fails):
    assert message in fails(generate.main, "--onnx", bundle / "step_fp32.onnx", *words)


def test_damaged_bundles(bundle, tmp_path, fails):
    def copy() -> "os.PathLike":
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle, folder)
        return folder

    def told(folder, name="step_fp32.onnx") -> str:
        return fails(generate.main, "--onnx", folder / name)
    folder = copy()
    whole = (folder / "step_fp32.onnx").read_bytes()
    (folder / "step_fp32.onnx").write_bytes(whole[:-100])
    assert "is damaged (checksum)" in told(folder)
    assert "no file" in told(folder, "step_fp64.onnx")
    folder = copy()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in told(folder)
    folder = copy()
    contents = json.loads((folder / "bundle.json").read_text())
    for changes, message in ((dict(format_version=9), "bundle format version 9"),
                             (dict(length=128), "its bundle.json says [1, 128]"),
                             (dict(dynamic=True), "its bundle.json says [None, None]"),
                             (dict(format="x"), "not the description of a bundle"),
                             (dict(kind=None), "is damaged (kind)"),
                             (dict(condition_len=32), "is damaged (files)"),
                             (dict(condition_len=0), "is damaged (files, condition_len)"),
                             (dict(condition_len=32, files={
                                 **contents["files"], "encoder": contents["files"]["fp32"]}),
                              "takes no condition, its bundle.json says otherwise"),
                             (dict(files={}), "is not in the bundle.json")):
        (folder / "bundle.json").write_text(json.dumps({**contents, **changes}))
        assert message in told(folder)
    (folder / "bundle.json").write_text(json.dumps({k: v for k, v in contents.items()
                                                    if k != "batch"}))
    assert "lacks batch" in told(folder)
    (folder / "bundle.json").unlink()
    assert "no bundle.json" in told(folder)
    with pytest.raises(Exception, match="no graph that ONNX Runtime can run"):
        OnnxSession(bundle / "tokenizer.json")


def test_a_step_with_a_condition_needs_one_in_its_bundle_json(told_bundle, tmp_path, fails):
    folder = shutil.copytree(told_bundle, tmp_path / "copy")
    contents = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**contents, "condition_len": None}))
    assert "takes a condition, its bundle.json says otherwise" in fails(
        generate.main, "--onnx", folder / "step_fp32.onnx")


@pytest.mark.parametrize(("words", "message"), [
    (["--precisions", "fp64"], "choose from fp32, fp16, int8"),
    (["--batch", "0"], "must be at least 1"), (["--cached_tokens", "0"], "must be at least 1"),
    (["--length", "20"], "multiple of 16"),
    (["--length", "512"], "rows of at most 256"), (["--guided"], "a model without a condition"),
    (["--check", "rtx", "--build_engine", "x"], "choose one"),
    (["--dynamic", "--length", "16"], "with --dynamic it must be at least 32"),
    (["--report_rows", "-1"], "0 or more"), (["--data_dir", "nowhere"], "no data in nowhere")])
def test_bad_flags(sharp_checkpoint, words, message, fails, tmp_path):
    words = words if "--check" in words else ["--checkpoint", sharp_checkpoint, *words]
    assert message in fails(main, "--out_dir", tmp_path / "bundle", *words)
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_replaced_only_when_asked(sharp_checkpoint, bundle, tmp_path, fails):
    assert "already there" in fails(main, "--checkpoint", sharp_checkpoint, "--out_dir", bundle)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    assert "holds other files" in fails(main, "--checkpoint", sharp_checkpoint, "--out_dir", other,
                                        "--overwrite")


def test_the_graphs_compile_for_nvidia(request, capsys):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    for bundle in ("bundle", "told_bundle", "joint_bundle"):
        main(["--check", "rtx", "--out_dir", str(request.getfixturevalue(bundle))])
    assert capsys.readouterr().out.count("no warning") == 12
