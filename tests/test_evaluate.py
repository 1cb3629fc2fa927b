import json
import math
import os
import shutil

import pytest
import torch

from corpus.rows import load_meta
from evaluate import main
from kinds.checkpoints import load_checkpoint
from kinds.likelihood import INVERSE_RATIOS
from measuring import infilling, likelihood, samplers


@pytest.fixture
def three_splits(long_data_dir, tmp_path):
    folder = shutil.copytree(long_data_dir, tmp_path / "three")
    meta = json.loads((folder / "meta.json").read_text())
    splits = meta["splits"]
    meta["splits"] = {"train": splits["train"], "val": splits["train"], "test": splits["val"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def call(checkpoint, long_data_dir, tmp_path, capsys):
    def run(*argv: object) -> tuple[dict, str]:
        target = tmp_path / "evaluation.json"
        main(["--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir), "--output",
              str(target), "--steps", "2", "--precision", "fp32", *map(str, argv)])
        return json.loads(target.read_text()), capsys.readouterr().out
    return run


def test_table_and_file(call, long_data_dir):
    result, text = call("--num_samples", 4)
    numbers = result["likelihood"]
    meta = load_meta(long_data_dir)["splits"]["val"]
    assert numbers["rows"] == meta["rows"] and numbers["bytes"] == meta["bytes"]
    assert numbers["tokens"] == meta["tokens"] - 2 * meta["stories"]
    nelbo = numbers["nelbo_nats_per_token"]
    assert 3 < nelbo < math.log(400) and numbers["perplexity"] == pytest.approx(math.exp(nelbo))
    expected = nelbo * numbers["tokens"] / math.log(2) / numbers["bytes"]
    assert numbers["bits_per_byte"] == pytest.approx(
        expected + numbers["length_code_bits_per_byte"])
    assert 0 < numbers["length_code_bits_per_byte"] < 0.1
    # under r(t) = t the average of the curve is the bound, up to its bins
    assert result["averages_over_t"]["t"]["cross_entropy"] == pytest.approx(nelbo, rel=0.02)
    hidden = sum(point["hidden"] for point in result["curve"])
    for key, total in (("cross_entropy", "masked_ce"), ("accuracy", "masked_accuracy")):
        mean = sum(point["hidden"] * point[key] for point in result["curve"]) / hidden
        assert result[total] == pytest.approx(mean)
    assert "EMA weights" in result["protocol"]
    assert len(result["curve"]) == 20
    assert set(result["averages_over_t"]) == set(INVERSE_RATIOS) and len(INVERSE_RATIOS) == 4
    assert all(f"\n{name:14s}" in text for name in INVERSE_RATIOS)  # none is left out in print
    assert set(result["diversity"]) == {"samples", "data"}
    for group in result["diversity"].values():
        assert 0 <= group["train_overlap_16"] <= group["train_overlap_8"] < 1
    for shown in ("train_overlap_8", "train_overlap_16", "bits/byte", "perplexity", "0.95 - 1.00",
                  "sin(pi t/2)^2", "distinct_3", "self_bleu"):
        assert shown in text


def test_fewer_rows_and_no_samples(call):
    result, text = call("--max_rows", 5, "--num_samples", 0, "--draws", 2)
    assert result["likelihood"]["rows"] == 5 and "diversity" not in result
    assert "2 masks a row, 5 rows of val" in result["protocol"]
    assert result == call("--max_rows", 5, "--num_samples", 0, "--draws", 2)[0]


def test_what_is_reported_comes_from_the_test_split(call, three_splits):
    """In this folder "test" has the rows that "val" had, and "val" those of the training."""
    quick = ("--num_samples", 3, "--draws", 1)
    asked = call(*quick, "--data_dir", three_splits, "--split", "test")[0]
    result, text = call(*quick, "--data_dir", three_splits)
    assert result["split"] == "test" and f"{result['likelihood']['rows']} rows of test" in text
    old = call(*quick)[0]
    assert old["split"] == "val" and "rows of val" in old["protocol"]  # which had no test split
    for key in ("likelihood", "curve", "diversity"):
        assert result[key] == asked[key] == old[key]
    chosen = call(*quick, "--data_dir", three_splits, "--split", "val", "--max_rows", 30)[0]
    assert chosen["split"] == "val" and chosen["likelihood"] != result["likelihood"]


def test_a_small_split_compares_fewer_stories(call):
    result, text = call("--num_samples", 9999, "--max_rows", 4, "--draws", 1)
    assert "only" in text and "diversity" in result


def test_default_output_stands_by_the_checkpoint(checkpoint, long_data_dir, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent.parent)
    main(["--num_samples", "0", "--max_rows", "4"])  # the data that it was trained on
    assert f"wrote {checkpoint.parent.name}/evaluation.json" in (
        capsys.readouterr().out.replace(os.sep, "/"))
    (checkpoint.parent / "evaluation.json").unlink()


@pytest.mark.parametrize("argv, message", [
    (["--steps", "0"], "--steps 0"), (["--max_rows", "0"], "--max_rows"),
    (["--draws", "0"], "--draws"), (["--num_samples", "-1"], "--num_samples"),
    (["--num_samples", "1"], "self-BLEU"), (["--output", "nowhere/x.json"], "folder that exists"),
    (["samplers", "--num_samples", "0"], "--num_samples 0"), (["--twin", "x.pt"], "--twin"),
    (["infilling", "--num_samples", "0"], "--num_samples 0"),
    (["samplers", "--num_samples", "1"], "--num_samples 1"),
    (["samplers", "--samplers", "best"], "--samplers 'best'"),
    (["samplers", "--evaluations", "0"], "--evaluations"),
    (["samplers", "--top_p", "0"], "--top_p 0"), (["--seed", "-1"], "--seed -1"),
    (["--guidance", "2"], "unrecognized arguments: --guidance"),
    (["--eta", "0.2"], "--eta belongs to"), (["sampling"], "invalid choice: 'sampling'"),
    (["--output", "."], "name a file"), (["--split", "test"], "--split"),
    (["--split", "test"], "only val, train")])
def test_bad_input(checkpoint, long_data_dir, argv, message, fails):
    command = [word for word in argv[:1] if not word.startswith("-")]
    assert message in fails(main, *command, "--checkpoint", checkpoint, "--data_dir",
                            long_data_dir, *argv[len(command):])
    assert not [*checkpoint.parent.glob("*.json")]


@pytest.mark.parametrize("command, flags, message", [
    ("likelihood", ["--draws", "2", "--steps", "3"], "--draws --steps: without effect"),
    ("infilling", ["--order", "entropy"], "--order: without effect for an autoregressive model")])
def test_what_an_autoregressive_model_does_not_know(command, flags, message, twin, fails):
    assert message in fails(main, command, "--checkpoint", twin, *flags)


@pytest.mark.parametrize("command, message", [
    ([], "use `python evaluate.py condition`"), (["likelihood"], "`python evaluate.py condition`"),
    (["samplers"], "samplers are compared for a model without a condition"),
    (["infilling"], "infilling is measured for a model without a condition")])
def test_a_model_with_a_condition_has_its_own_command(command, message, conditional_checkpoint,
                                                      fails):
    assert message in fails(main, *command, "--checkpoint", conditional_checkpoint)


def test_without_a_command_it_is_the_likelihood(checkpoint, long_data_dir, tmp_path):
    quick = ["--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir), "--num_samples",
             "0", "--max_rows", "3", "--output", str(tmp_path / "e.json")]
    results = []
    for command in ([], ["likelihood"]):
        main([*command, *quick])
        results.append(json.loads((tmp_path / "e.json").read_text()))
    assert results[0] == results[1] and results[0]["likelihood"]["rows"] == 3


def test_the_newest_checkpoint_of_a_fitting_kind_is_measured(
        checkpoint, conditional_checkpoint, twin, tmp_path, monkeypatch, capsys):
    for age, (name, source) in enumerate((("plain", checkpoint), ("ar", twin),
                                          ("conditional", conditional_checkpoint))):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "best.pt")
        os.utime(tmp_path / name / "best.pt", (1e9 + age, 1e9 + age))
    monkeypatch.chdir(tmp_path)
    main(["likelihood", "--num_samples", "0", "--max_rows", "2"])
    main(["samplers", "--num_samples", "2", "--evaluations", "1", "--samplers", "random"])
    main(["infilling", "--num_samples", "2"])
    main(["condition", "--num_samples", "0", "--max_rows", "4", "--draws", "1"])
    capsys.readouterr()
    assert sorted(str(path) for path in tmp_path.glob("*/*.json")) == [
        str(tmp_path / path) for path in ("ar/evaluation.json", "ar/infilling.json",
                                          "conditional/evaluation.json", "plain/sampling.json")]


def test_rows_longer_than_the_model_are_refused(checkpoint, long_data_dir, tmp_path, fails):
    contents = load_checkpoint(checkpoint)
    contents["model_config"]["max_len"] = 64  # as if trained on the same text in shorter rows
    torch.save(contents, tmp_path / "short.pt")
    assert "at most 64" in fails(main, "--checkpoint", tmp_path / "short.pt", "--data_dir",
                                 long_data_dir)


def test_foreign_data(checkpoint, data_dir, tmp_path, fails):
    assert "another tokenizer" in fails(main, "--checkpoint", checkpoint, "--data_dir", data_dir)
    assert "no data in" in fails(main, "--checkpoint", checkpoint, "--data_dir", tmp_path)
    assert "no checkpoint" in fails(main, "--checkpoint", "nowhere/x.pt")
    assert "is a folder" in fails(main, "--checkpoint", tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_outputs_that_cannot_be_written_are_found_before_the_work(
        checkpoint, long_data_dir, tmp_path, fails, monkeypatch):
    for module in (likelihood, samplers, infilling):
        monkeypatch.setattr(module, "open_model", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("x_pareto.png", "folder"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    for words in (["file/x.json"], ["link/x.json"], ["gone/x.json"], ["folder"],
                  ["n" * 300 + ".json"], ["x.json", "samplers"], ["folder", "infilling"]):
        fails(main, *words[1:], "--checkpoint", checkpoint, "--output", tmp_path / words[0])
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_of_other_rows_is_said_to_be_one(checkpoint, long_data_dir, tmp_path, capsys):
    main(["--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir), "--num_samples", "0",
          "--max_rows", "2", "--output", str(tmp_path / "same.json")])
    assert "warning" not in capsys.readouterr().err
    shutil.copytree(long_data_dir, tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    meta["splits"]["train"], meta["splits"]["val"] = (meta["splits"][name]
                                                      for name in ("val", "train"))
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta))
    main(["--checkpoint", str(checkpoint), "--data_dir", str(tmp_path / "other"), "--split", "val",
          "--num_samples", "0", "--max_rows", "2", "--output", str(tmp_path / "other.json")])
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "val split may be among them" in error
