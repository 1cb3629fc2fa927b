"""evaluate.py blocks and benchmark.py write: what each way of writing costs and gives."""

import json

import numpy as np
import pytest
import torch

import benchmark
import evaluate
from corpus.rows import TokenRows
from corpus.tokens import BOS
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.kind import drawn_lengths
from kinds.registry import kind_of
from measuring import blocks
from measuring.blocks import BlocksConfig, Way, written
from measuring.writing_speed import Uncached
from sampling.cached import CachedModel
from sampling.left_to_right import rows_of, write_blocks
from sampling.sampler import Sampler

WAYS = ["causal", "4/2", "verify 4/1", "verify 3/0", "row/4", "twin"]


@pytest.fixture(scope="module")
def table(joint_checkpoint, twin, long_data_dir, tmp_path_factory):
    """The folder that one run of the command wrote into. The judge is the twin under another name.
    """
    folder = tmp_path_factory.mktemp("blocks")
    judge = folder / "judge.pt"
    judge.write_bytes(twin.read_bytes())
    evaluate.main(["blocks", *map(str, (
        "--checkpoint", joint_checkpoint, "--twin", twin, "--judge", judge, "--data_dir",
        long_data_dir, "--num_samples", 3, "--max_rows", 8, "--batch", 2, "--repeats", 1,
        "--device", "cpu", "--output", folder / "blocks.json", "--ways", *WAYS))])
    return folder


def test_every_way_has_its_line(table, capsys):
    result = json.loads((table / "blocks.json").read_text())
    lines = {line["way"]: line for line in result["ways"]}
    assert list(lines) == WAYS and (table / "block_tradeoff.png").stat().st_size > 10_000
    for line in lines.values():
        assert line["bits_per_byte"] > 0 and line["generative_perplexity"] > 1
        assert line["perplexity_error"] > 0 and len(line["story_nats_per_token"]) == 3
        assert line["batch_1"]["tokens_per_cpu_second"] > 0
        assert 0 < line["batch_2"]["seconds_to_first_text"]
    # a verified draft is judged by the mode that it is distributed as; its own differ
    assert (lines["verify 4/1"]["bits_per_byte"] == lines["verify 3/0"]["bits_per_byte"]
            == lines["causal"]["bits_per_byte"])
    assert len({line["bits_per_byte"] for line in lines.values()}) == 4
    assert lines["causal"]["evaluations_per_token"] == 1 == lines["causal"]["tokens_per_piece"]
    assert lines["row/4"]["cache_bytes_per_token"] == 0 < lines["4/2"]["cache_bytes_per_token"]
    assert result["data"]["generative_perplexity"] > 1


def test_a_way_writes_what_its_kind_writes(joint_checkpoint, long_data_dir):
    """The stories of a table are those of the kind's own mode, in batches of any size."""
    checkpoint = load_checkpoint(joint_checkpoint, "joint")
    model, kind = model_from_checkpoint(checkpoint).for_inference(), kind_of(checkpoint)
    histogram = TokenRows(long_data_dir, "val").meta["length_histogram"]
    lengths = [n + 2 for n in drawn_lengths(histogram, 3, 0, model.config.max_len)]
    for name, mode in (("causal", "causal"), ("4/4", "4"), ("row/4", "row")):
        way = Way.read(name, BlocksConfig())
        rows = written(way, kind, model, lengths, seed=5).rows
        expected = kind.in_mode(mode).write(model, [n - 2 for n in lengths], way.sampler, 5)
        assert all(np.array_equal(a, b) for a, b in zip(rows, expected, strict=True))
        if way.size:
            again = written(way, kind, model, lengths[2:], seed=5, first=2).rows
            assert np.array_equal(again[0], rows[2])


@pytest.mark.parametrize("argv, words", [
    (["--ways", "5"], "--ways '5'"), (["--ways", "1/1"], "--ways '1/1'"),
    (["--ways", "verify row/2"], "--ways 'verify row/2'"), (["--ways", "twin"], "--twin"),
    (["--num_samples", "1"], "--num_samples 1"), (["--judge", "TWIN", "--twin", "TWIN"], "--judge"),
])
def test_what_is_refused(joint_checkpoint, twin, long_data_dir, fails, argv, words):
    argv = [twin if word == "TWIN" else word for word in argv]
    if "--ways" not in argv:
        argv += ["--ways", "causal"]
    assert words in fails(evaluate.main, "blocks", "--checkpoint", joint_checkpoint, "--data_dir",
                          long_data_dir, *argv)


def test_another_kind_is_refused(checkpoint, long_data_dir, fails):
    error = fails(evaluate.main, "blocks", "--checkpoint", checkpoint, "--data_dir", long_data_dir,
                  "--ways", "causal")
    assert "--objective joint" in error


def test_the_benchmark_of_writing(tmp_path, capsys):
    target = tmp_path / "write.json"
    benchmark.main(["write", *map(str, (
        "--model_config", "tiny", "--batch", 2, "--seq_len", 24, "--vocab_size", 50, "--repeats",
        1, "--block_size", 4, "--steps", 2, "--device", "cpu", "--precision", "fp32",
        "--no-memory", "--json", target))])
    arms = json.loads(target.read_text())["arms"]
    assert list(arms) == ["textbook", "causal", "blocks", "uncached", "verified",
                          "headed"]
    assert arms["textbook"]["tokens"] == 2 * 23 and arms["textbook"]["evaluations"] == 23
    assert all(arm["tokens_per_cpu_second"] > 0 for arm in arms.values())
    assert arms["causal"]["evaluations"] <= 23
    assert arms["causal"]["later"] > 0 < arms["blocks"]["seconds_to_first_text"]
    assert "textbook" in capsys.readouterr().out


def test_without_a_cache_the_stories_are_the_same(joint_checkpoint):
    model = model_from_checkpoint(load_checkpoint(joint_checkpoint, "joint"))
    sampler, starts = Sampler(steps=2), [np.array([BOS]), np.array([BOS, 20]), np.array([BOS])]
    cached, uncached = (
        rows_of(write_blocks(reader(model, sampler), starts, sampler, 4, 90, seed=3), starts)
        for reader in (CachedModel, Uncached))
    assert len({len(row) for row in cached}) > 1  # rows leave at different times
    assert all(np.array_equal(a, b) for a, b in zip(cached, uncached, strict=True))


@pytest.fixture
def headless(joint_checkpoint, tmp_path):
    source = load_checkpoint(joint_checkpoint, "joint")
    source["weights"] = {name: weight for name, weight in source["weights"].items()
                         if not name.startswith("draft.")}
    source["model_config"]["draft_rank"] = 0
    torch.save(source, tmp_path / "headless.pt")
    return tmp_path / "headless.pt"


def test_ways_that_need_a_draft_head(headless, twin, long_data_dir, tmp_path, fails, monkeypatch):
    error = fails(evaluate.main, "blocks", "--checkpoint", headless, "--data_dir", long_data_dir,
                  "--ways", "causal", "verify 4/0")
    assert "--ways 'verify 4/0'" in error and "has no draft head" in error
    told = []
    monkeypatch.setattr(blocks, "measure", lambda config, arms, *rest: told.extend(arms) or [])
    monkeypatch.setattr(blocks, "plot", lambda *args: None)
    evaluate.main(["blocks", *map(str, (
        "--checkpoint", headless, "--data_dir", long_data_dir, "--twin", twin, "--device", "cpu",
        "--num_samples", 2, "--output", tmp_path / "b.json"))])
    assert told == [name for name in blocks.WAYS if not name.endswith("/0")]


def test_arms_that_a_checkpoint_has_not(twin, headless, fails):
    assert "--arms" in fails(benchmark.main, "write", "--checkpoint", twin, "--no-memory")
    assert "no draft head" in fails(benchmark.main, "write", "--checkpoint", headless,
                                    "--no-memory")
