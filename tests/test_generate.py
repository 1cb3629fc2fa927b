import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, as_joint, python

from corpus.conditions import read_conditions
from corpus.tokens import BOS, EOS, MASK, decode, round_up
from diffusion import DiscreteDiffusion
from generate import main
from kinds.checkpoints import load_checkpoint, tokenizer_from_checkpoint
from model import DiffusionTransformer
from network.layers import OLDER, ModelConfig
from sampling.rows import GAP, Vocabulary, infill_row, lay_out, text_with_gaps
from sampling.sampler import PRESETS, Sampler


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
    spaced, plain = (call("--prompt", prompt, "--length", 30, "--no-heal")[0]
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


def test_a_joint_model_fills_gaps_with_some_of_its_left_to_right_mode(checkpoint, tmp_path, capsys):
    path = str(as_joint(checkpoint, tmp_path / "joint.pt"))

    def filled(*flags: str) -> dict:
        main(["--checkpoint", path, "--num_samples", "1", "--no-heal", "--infill",
              "Tom had a[MASK:4] he was happy.", "--json", *flags])
        return json.loads(capsys.readouterr().out)
    usual = filled()
    assert usual == filled("--steps", "1024", "--order", "left", "--pace", "linear", "--left_share",
                           "0.3")
    assert filled("--left_share", "0.3") == usual != filled("--left_share", "0.9")
    # two evaluations a token, and without that share one
    assert usual["nfe"] == 8 and filled("--left_share", "0")["nfe"] == 4
    assert filled("--order", "left", "--steps", "9", "--pace", "linear")["nfe"] == 4


# ---- words that the text cuts --------------------------------------------------------------------

@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer)


def in_bytes(vocabulary, tokenizer, text: str) -> str:
    return "".join(vocabulary.texts[i] for i in tokenizer.encode(text).ids)


def described(places, vocabulary) -> list:
    """Ids as their texts, what is free as None, limited places as the shortest token allowed."""
    return [min((vocabulary.texts[i] for i in np.flatnonzero(place)), key=len)
            if isinstance(place, np.ndarray) else
            None if place == MASK else [vocabulary.texts[place]] for place in places]


def test_what_is_taken_back(tokenizer, vocabulary):
    def places(*parts) -> list:
        return described(lay_out(list(parts), tokenizer, vocabulary), vocabulary)
    s, nl = vocabulary.space, in_bytes(vocabulary, tokenizer, "\n")
    assert tokenizer.encode("Tom had a fri").tokens[-2:] == [f"{s}f", "ri"]
    assert tokenizer.encode(" friend").tokens == [f"{s}friend"]
    # a piece of several tokens becomes one place, for one token begins with it
    assert places("Tom had a fri", 2)[-4:] == [[f"{s}a"], f"{s}frie", None, None]
    assert f"{s}friend" in [vocabulary.texts[i] for i in np.flatnonzero(
        lay_out(["Tom had a fri", 2], tokenizer, vocabulary)[-3])]
    # a space is brought by the first hidden token, another white space stays
    assert places("a ", 3) == [["a"], s, None, None]
    assert places("a  ", 3) == [["a"], [s], s, None, None]
    assert places("a\n\n", 2) == [["a"], [nl], [nl], None, None]
    assert places("a\n ", 2) == [["a"], [nl], s, None]
    assert places("a", 2) == ["a", None, None]  # a single token
    assert places("", 2) == [None, None]
    assert places(" ", 2) == [s, None]
    # behind a gap
    assert places("", 2, "im ", 1) == [None, None, "im", s]
    assert places("", 2, " im") == [None, None, *([x] for x in tokenizer.encode(" im").tokens)]
    assert places("", 1, "\na", 1, "") == [None, [nl], "a", None]
    assert places("", 2, ".") == [None, None, "."]
    assert places("", 1, "", 2, "") == [None, None, None]  # gaps side by side
    assert places("", 1, " ", 2, "") == [None, s, None]
    # both ends of a piece of one word are hidden: one token holds it, or one holds each end
    assert places("", 1, "im", 1, "") == [None, "im", None]
    assert f"{s}time" in [vocabulary.texts[i] for i in np.flatnonzero(
        lay_out(["", 1, "im", 1, ""], tokenizer, vocabulary)[1])]
    assert places("", 1, "xqz", 1, "") == [None, "x", ["q"], "z", None]
    # never a special token, whatever its name begins with
    for part in ("[", "[M", "[MASK]"):
        for place in lay_out([part, 1], tokenizer, vocabulary):
            assert not isinstance(place, np.ndarray) or not place[:4].any()


@pytest.mark.parametrize("seed", range(20))
def test_every_text_around_gaps_stays_byte_for_byte(tokenizer, vocabulary, seed):
    """Whatever is drawn of what may be drawn; and a gap of n has its n places."""
    for case in range(15):
        every_text_stays(tokenizer, vocabulary, np.random.default_rng([seed, case]))


def every_text_stays(tokenizer, vocabulary, rng):
    letters = [*"  \n\n.'\"[]MASKthetimeandsai\u00e9\u201c"]
    texts = ["".join(rng.choice(letters, rng.integers(0, 12))) for _ in range(rng.integers(2, 5))]
    parts: list = [texts[0]]
    for text in texts[1:]:
        parts += [int(rng.integers(1, 4)), text]
    places = lay_out(parts, tokenizer, vocabulary)
    row = [int(rng.choice(np.flatnonzero(place))) if isinstance(place, np.ndarray) else
           int(rng.integers(4, len(vocabulary.texts))) if place == MASK else place
           for place in places]
    told = "".join(vocabulary.texts[i] for i in row)
    wanted = (re.escape(in_bytes(vocabulary, tokenizer, text)) for text in texts)
    assert re.fullmatch(".*".join(wanted), told, re.DOTALL)
    # as many tokens as without healing, but that pieces of a word may become one
    plain = lay_out(parts, tokenizer, None)
    assert plain.count(MASK) == sum(parts[1::2]) and len(places) <= len(plain)


def test_a_prompt_that_ends_inside_a_word_is_completed(call, tokenizer):
    words = ["--prompt", "Tom had a fri", "--num_samples", 40, "--length", 12]
    stories = call(*words)[0]
    assert all(story["text"].startswith("Tom had a frie") for story in stories)
    assert any(story["text"].startswith("Tom had a friend") for story in stories)
    assert all(len(story["tokens"]) == 14 and story["nfe"] == 5 for story in stories)
    # "a" may go on, and may be the whole word
    stories = call("--prompt", "Tom a", "--num_samples", 60, "--length", 6, "--temperature", 1)[0]
    ids = tokenizer.encode("Tom a").ids
    place = len(ids)  # in the row, behind [BOS]
    assert all(story["text"].startswith("Tom a") for story in stories)
    drawn = {story["tokens"][place] for story in stories}
    assert len(drawn) > 1 and ids[-1] in drawn
    # not so without healing
    assert {story["tokens"][place] for story in call(
        "--prompt", "Tom a", "--num_samples", 60, "--length", 6, "--no-heal")[0]} == {ids[-1]}
    # the prompt and one token behind it must fit
    assert call("--prompt", "Tom a", "--length", len(ids) + 1)[0]


def test_a_space_ends_the_word(call):
    for words in (["--prompt", "Tom a ", "--length", 8], ["--infill", "Tom a [MASK:4]"]):
        for story in call(*words, "--num_samples", 30)[0]:
            assert story["text"].startswith("Tom a ")
    # of the hidden tokens it takes none for itself
    (healed,), (plain,) = (call("--infill", "Tom a [MASK:4].", "--num_samples", 1, *more)[0]
                           for more in ([], ["--no-heal"]))
    assert len(healed["tokens"]) == len(plain["tokens"])


def test_prompts_and_gaps_treat_white_space_alike(call, tokenizer):
    for text in ("Tom a", "Tom a ", "Tom a  ", "Tom a\n", "Tom a\n\n", " Tom a"):
        ids = tokenizer.encode(text.strip()).ids
        for more in ([], ["--no-heal"]):
            (gap,), _ = call("--infill", f"{text}[MASK:5]", "--num_samples", 1, *more)
            (prompt,), _ = call("--prompt", text, "--length", len(gap["tokens"]) - 2,
                                "--num_samples", 1, *more)
            assert prompt == gap and len(ids) + 5 <= len(gap["tokens"]) - 2 <= len(ids) + 7
    # and as in training there is none behind the last text
    plain, spaced = (call("--infill", f"Tom [MASK:3] ran{end}")[0] for end in ("", " \n"))
    assert plain == spaced


@pytest.mark.parametrize("text", [
    "Tom was jum[MASK:3]ing with a d[MASK:2].", "[MASK:2]ing", "th[MASK]", "[MASK:2]im[MASK:2]",
    "Tom\n\n[MASK:2]\nand [MASK:1] [MASK:2]\u00e9t", "a [MASK]", "[MASK:2][MASK:1]e ran",
    "Tom  [MASK:2]  ran\u201c[MASK:1]\u201d"])
def test_the_text_around_a_gap_stays(call, text):
    wanted = ".*".join(re.escape(part) for part in re.split(r"\[MASK[^\]]*\]", text))
    stories = call("--infill", text, "--num_samples", 30)[0]
    assert len(stories) == 30
    for story in stories:
        assert re.fullmatch(wanted, story["text"], re.DOTALL)
    assert call("--infill", text, "--num_samples", 30, "--batch_size", 7)[0] == stories
    assert call("--infill", text, "--num_samples", 30, "--seed", 1)[0] != stories


def test_each_edge_costs_an_evaluation(call, conditional_checkpoint, capsys):
    for text, nfe in (("Tom was jum[MASK:9]ing.", 6), ("Tom was [MASK:9] here.", 5),
                      ("a [MASK]", 1), ("[MASK:9] ran", 4)):
        (story,), error = call("--infill", text, "--num_samples", 1)
        assert story["nfe"] == nfe and f"{nfe} network evaluations" in error
    main(["--checkpoint", str(conditional_checkpoint), "--condition", "Tom ran.", "--guidance", "2",
          "--prompt", " Th", "--steps", "3", "--num_samples", "1", "--json"])
    story = json.loads(capsys.readouterr().out)
    assert story["nfe"] == 8 and story["text"].startswith(" Th")


def test_steps_of_healed_text(checkpoint, capsys):
    words = ["--checkpoint", str(checkpoint), "--steps", "3", "--num_samples", "1", "--show_steps"]
    main([*words, "--infill", "Tom had a fri[MASK:4] th[MASK:3]"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[story")]
    assert shown[0] == "[story 1, step 0] Tom had a fri _ _ _ _ th _ _ _"  # as it was given
    assert len(shown) == 4 and all("Tom had a frie" in line for line in shown[1:])
    main([*words, "--infill", "a [MASK]"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[story")]
    assert len(shown) == 1 and " _" not in shown[0]  # the edge was all


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
    monkeypatch.setattr("kinds.checkpoints.PRETRAINED", tmp_path / "pretrained.pt")
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


def test_a_twin_trained_last_is_passed_over(checkpoint, twin, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    for name, source, age in (("plain", checkpoint, 1000), ("twin", twin, 2000)):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "best.pt")
        os.utime(tmp_path / name / "best.pt", (age, age))
    main(["--steps", "2"])
    assert "using plain/best.pt; newer" in capsys.readouterr().err
    assert "conditional or conditional_joint model; found" in fails(
        main, "--steps", "2", "--condition", "Once.")


@pytest.mark.parametrize("settings, golden", [
    (OLDER, {"random": [2, 11, 31, 6, 6, 6, 6, 6, 6, 22, 3],
             "confidence": [2, 11, 6, 31, 6, 22, 6, 6, 6, 25, 3]}),
    ({}, {"random": [2, 11, 26, 20, 7, 27, 7, 27, 15, 27, 3],
          "confidence": [2, 11, 15, 27, 7, 7, 12, 27, 27, 26, 3]}),
    ({"self_conditioning": 1.0}, {"random": [2, 11, 35, 37, 4, 4, 18, 5, 30, 13, 3],
                                  "confidence": [2, 11, 26, 37, 7, 27, 7, 19, 30, 6, 3]})])
def test_golden_tokens(settings, golden):
    """A seeded network and noise give exactly these tokens, on every machine."""
    torch.manual_seed(7)
    model = DiffusionTransformer(ModelConfig(width=32, heads=2, layers=2, vocab_size=40,
                                             max_len=16, neighbour_init=0.0,
                                             tied_head=False, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    row = np.array([[BOS, 11, *[MASK] * 8, EOS]])
    for order, expected in golden.items():
        sampler = Sampler(order=order, steps=4, top_k=5)
        *_, last = DiscreteDiffusion().unmask(model, row, sampler, seed=1)
        assert last.tokens[0].tolist() == expected
    assert GAP.search("[MASK:12]")[1] == "12"


def test_null_conditions_are_left_out_and_said_to_be(tmp_path, capsys):
    path = tmp_path / "conditions.jsonl"
    path.write_text('{"condition": null}\n{"condition": " A cat. "}\n{"condition": ""}\n')
    assert read_conditions(path) == ["A cat."]
    assert "1 conditions" in capsys.readouterr().err
