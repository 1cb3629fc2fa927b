import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, python

from data_prep import BOS, EOS, MASK, decode, round_up
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


@pytest.mark.parametrize(("words", "message"), [
    (["--prompt", "Tom had a [MASK:3]."],
     "--prompt: '[MASK:3]' is taken as text; gaps are filled in --infill, spelled [MASK:n]"),
    (["--prompt", "Tom [mask] and [MASK 2]"], "--prompt: '[mask]' is taken as text"),
    (["--infill", "Tom [mask:3] a [MASK:2]."],
     "--infill: '[mask:3]' is taken as text; a gap is spelled [MASK:n]"),
    (["--infill", "Tom [MASK 3] a [MASK:2]. [Mask]"], "--infill: '[MASK 3]'"),
    (["--infill", "Tom [ MASK:3 ] a [MASK:2]."], "--infill: '[ MASK:3 ]'"),
    (["--infill", "Tom [MASK:2] a [Mask: 3 ]."], "--infill: '[Mask: 3 ]'"),
    (["--infill", "Tom [MASK:2] a [Mask : 3]."], "--infill: '[Mask : 3]'"),
    (["--infill", "Tom [MASK:2] and [mask of gold] and [masked] and mask:3"], None),
    (["--infill", "Tom [MASK] [MASK:2]"], None)])
def test_what_looks_like_a_gap_and_is_text_is_named(call, words, message):
    (story,), error = call(*words, "--num_samples", 1)
    warnings = [line for line in error.splitlines() if line.startswith("warning")]
    assert len(warnings) == (message is not None)
    if message:
        assert message in warnings[0]
        assert message.split("'")[1] in story["text"]  # it is text nevertheless


def test_conditions_with_gaps_are_named_once(conditional_checkpoint, tmp_path, capsys):
    file = tmp_path / "conditions.txt"
    file.write_text("Tom ran.\nTom [MASK:3] ran.\nTom [MASK:4] ran.\n")
    for words in (["--conditions", str(file)], ["--condition", "Tom [MASK:3] ran."]):
        main(["--checkpoint", str(conditional_checkpoint), "--steps", "1", *words])
        error = capsys.readouterr().err
        assert error.count("warning") == 1 and f"{words[0]}: '[MASK:3]' is taken as text" in error


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


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}


def test_json_lines_are_there_as_stories_finish(checkpoint):
    """Read from a pipe while the process works; Ctrl-C in the middle leaves whole lines of UTF-8,
    also where the locale is not UTF-8."""
    words = ["--checkpoint", checkpoint, "--num_samples", 400, "--batch_size", 2, "--steps", 40,
             "--temperature", 2, "--json"]
    process = subprocess.Popen(
        python(ROOT / "generate.py", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **C_LOCALE})
    first = [process.stdout.readline() for _ in range(3)]
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.decode() == "error: interrupted\n"
    output = b"".join(first) + rest
    assert output.endswith(b"\n")
    stories = [json.loads(line) for line in output.decode("utf-8").split("\n")[:-1]]
    assert 3 <= len(stories) < 400
    assert len({story["row"] for story in stories}) == len(stories)
    # bytes drawn at random make broken letters, each of which is one letter in the text
    assert any("\ufffd" in story["text"] for story in stories)


def test_lines_come_by_width_and_the_first_row_first(call, checkpoint, capsys):
    stories = call("--num_samples", 12, "--batch_size", 2)[0]
    rows, widths = zip(*((story["row"], round_up(len(story["tokens"]))) for story in stories),
                       strict=True)
    assert sorted(rows) == list(range(12)) != list(rows) and rows[0] == 0
    assert len(set(widths)) == 1 + sum(a != b for a, b in zip(widths, widths[1:], strict=False))
    # plain text keeps the order of the rows
    main(["--checkpoint", str(checkpoint), "--steps", "4", "--num_samples", "12"])
    told = capsys.readouterr().out
    by_row = {story["row"]: story["text"] for story in stories}
    places = [told.index(f"--- {i + 1} ---\n{by_row[i]}\n") for i in range(12)]
    assert places == sorted(places)


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
