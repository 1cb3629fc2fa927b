import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, python

from data_prep import BOS, EOS, MASK, decode
from diffusion import DiscreteDiffusion
from generate import GAP, infill_row, main, text_with_gaps
from model import DiffusionTransformer, ModelConfig, load_checkpoint, tokenizer_from_checkpoint
from sampler import PRESETS, Sampler


@pytest.fixture
def call(checkpoint, capsys):
    def run(*argv: object) -> tuple[list[dict], str]:
        """The JSON objects and what stood on stderr."""
        main(["--checkpoint", str(checkpoint), "--steps", "4", "--json", *map(str, argv)])
        captured = capsys.readouterr()
        return [json.loads(line) for line in captured.out.splitlines()], captured.err
    return run


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return tokenizer_from_checkpoint(load_checkpoint(checkpoint))


def test_stories_and_speed_are_printed(checkpoint, capsys):
    main(["--checkpoint", str(checkpoint), "--num_samples", "2", "--steps", "3"])
    text = capsys.readouterr().out
    assert "--- 1 ---" in text and "--- 2 ---" in text
    assert text.strip().splitlines()[-1].endswith("tokens/s")


def test_json_lines(call, tokenizer):
    results, error = call("--num_samples", 3, "--length", 20)
    assert [result["row"] for result in results] == [0, 1, 2]
    for result in results:
        assert len(result["tokens"]) == 22
        assert result["tokens"][0] == BOS and result["tokens"][-1] == EOS
        assert all(token > EOS for token in result["tokens"][1:-1])
        assert result["text"] == decode(tokenizer, result["tokens"])
    assert "60 tokens in 3 stories, 4 network evaluations" in error


def test_the_same_seed_gives_the_same_stories_in_any_batch(call):
    stories = call("--num_samples", 8, "--seed", 5)[0]
    assert call("--num_samples", 8, "--seed", 5, "--batch_size", 3)[0] == stories
    assert {story["nfe"] for story in stories} == {4}
    assert call("--num_samples", 1, "--seed", 5)[0] == stories[:1]
    assert call("--num_samples", 8, "--seed", 6)[0] != stories


def test_a_prompt_stays(call):
    for length in ([], ["--length", 60]):
        for result in call("--prompt", "Once upon a time", "--num_samples", 3, *length)[0]:
            assert result["text"].startswith("Once upon a time")
    assert len(result["tokens"]) == 62
    spaced, plain = (call("--prompt", prompt, "--length", 30)[0]
                     for prompt in ("Once upon a time ", "Once upon a time"))
    assert spaced == plain  # the next word brings its own space


def test_a_prompt_longer_than_every_story_goes_to_the_end_of_the_row(call, tokenizer):
    prompt = "and then he ran " * 40
    count = len(tokenizer.encode(prompt).ids)
    assert 190 < count < 254
    (result,), _ = call("--prompt", prompt, "--num_samples", 1)
    assert len(result["tokens"]) == 256


def test_gaps_are_filled_and_the_rest_stays(call, tokenizer):
    text = "Tom had a [MASK:6] and he was [MASK]."
    for result in call("--infill", text, "--num_samples", 2)[0]:
        assert result["text"].startswith("Tom had a") and result["text"].endswith(".")
        assert " and he was" in result["text"]
    row = infill_row(text, tokenizer, 256)
    assert (row == MASK).sum() == 7
    visible = " _ _ _ _ _ _ and he was _."
    assert text_with_gaps(tokenizer, row) == "Tom had a" + visible
    assert (infill_row("[MASK:3]", tokenizer, 256) == [BOS, MASK, MASK, MASK, EOS]).all()


def test_steps_are_shown(checkpoint, capsys):
    words = ["--checkpoint", str(checkpoint), "--infill", "Tom [MASK:8].", "--steps", "3",
             "--num_samples", "1", "--show_steps"]
    main(words)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[story")]
    assert shown[0] == "[story 1, step 0] Tom" + " _" * 8 + "."
    gaps = [line.count(" _") for line in shown]
    assert len(shown) == 4 and gaps == sorted(gaps, reverse=True) and gaps[-1] == 0
    main([*words, "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) and captured.err.count("[story") == 4


def test_options_reach_the_sampler(call):
    base = call("--num_samples", 2, "--length", 40)[0]
    for option in (["--order", "confidence"], ["--pace", "linear"], ["--temperature", 2],
                   ["--top_k", 1], ["--top_p", 0.1]):
        assert call("--num_samples", 2, "--length", 40, *option)[0] != base
    greedy = [call("--length", 40, "--num_samples", 1, "--order", "confidence", *option)[0][0]
              for option in (["--top_k", 1], ["--temperature", 0])]
    assert greedy[0]["tokens"] == greedy[1]["tokens"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_flags_are(name, checkpoint, capsys):
    def told(*argv: str) -> list[dict]:
        main(["--checkpoint", str(checkpoint), "--json", "--length", "20", *argv])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    flags = [part for key, value in PRESETS[name].items() for part in (f"--{key}", str(value))]
    assert told("--preset", name) == told(*flags) != told()
    # a flag beside it counts
    assert [row["nfe"] for row in told("--preset", name, "--steps", "1")] == [1, 1, 1]


@pytest.mark.parametrize("argv, message", [
    (["--infill", "Tom had a [MASK:0]."], "[MASK:0]"), (["--infill", "[MASK:-2]"], "[MASK:-2]"),
    (["--infill", "[MASK:many]"], "[MASK:many]"), (["--infill", "[MASK:]"], "[MASK:]"),
    (["--infill", "no gap"], "no gap"), (["--infill", "a [MASK:9999]"], "longer"),
    (["--infill", "word " * 300 + "[MASK:2]"], "shorten"),
    (["--prompt", "word " * 300], "--prompt"),
    (["--prompt", "one two three four", "--length", "3"], "--prompt"),
    (["--infill", "[MASK:2]", "--length", "9"], "--infill"), (["--steps", "0"], "--steps 0"),
    (["--length", "255"], "254"), (["--length", "0"], "--length"), (["--num_samples", "0"], "1"),
    (["--order", "best"], "confidence"), (["--top_p", "0"], "--top_p"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**64)], "--seed"),
    (["--infill", f"[MASK:{'9' * 5000}]"], "[MASK:"), (["--prompt", "\udcff"], "Unicode"),
    (["--gamma", "0.3"], "--pace entropy_bound"), (["--eta", "0.3"], "--remask"),
    (["--pace", "linear", "--threshold", "0.5"], "--pace threshold"),
    (["--device", "toaster"], "--device"), (["--temperature", "-1"], "--temperature")])
def test_bad_input(checkpoint, argv, message, fails):
    assert message in fails(main, "--checkpoint", checkpoint, *argv)


def test_no_checkpoint(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert "train.py" in fails(main)
    assert "no checkpoint" in fails(main, "--checkpoint", "x.pt")
    (tmp_path / "x.pt").write_text("weights")
    assert "not a checkpoint" in fails(main, "--checkpoint", "x.pt")


def test_the_command_as_typed(checkpoint):
    """The default checkpoint, a real process, a mistake that needs no torch to be found."""
    done = subprocess.run(python(ROOT / "generate.py", "--num_samples", "5", "--temperature", "0.8",
                                 "--steps", "2"),
                          cwd=checkpoint.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "--- 5 ---" in done.stdout
    done = subprocess.run(
        python("-X", "importtime", ROOT / "generate.py", "--steps", "0"), capture_output=True,
        text=True)
    assert done.returncode == 2 and "error: --steps 0" in done.stderr
    assert " torch\n" not in done.stderr


def test_a_twin_trained_last_is_passed_over(checkpoint, twin, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    for name, source, age in (("plain", checkpoint, 1000), ("twin", twin, 2000)):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "best.pt")
        os.utime(tmp_path / name / "best.pt", (age, age))
    main(["--steps", "2"])
    assert "using plain/best.pt; newer" in capsys.readouterr().err
    assert "conditional model; found" in fails(main, "--steps", "2", "--condition", "Once.")


def test_golden_tokens():
    """A seeded network and noise give exactly these tokens, on every machine."""
    torch.manual_seed(7)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=40,
                                             max_len=16, neighbour_init=0.0,
                                             tied_head=False)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    row = np.array([[BOS, 11, *[MASK] * 8, EOS]])
    golden = {"random": [2, 11, 31, 6, 6, 6, 6, 6, 6, 22, 3],
              "confidence": [2, 11, 6, 31, 6, 22, 6, 6, 6, 25, 3]}
    for order, expected in golden.items():
        sampler = Sampler(order=order, steps=4, top_k=5)
        *_, last = DiscreteDiffusion().unmask(model, row, sampler, seed=1)
        assert last.tokens[0].tolist() == expected
    assert GAP.search("[MASK:12]")[1] == "12"
