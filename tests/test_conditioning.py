import json
import math

import numpy as np
import pytest
import torch
from test_conditional import small_conditional

from corpus.rows import TokenRows
from corpus.sample_stories import sample_stories
from corpus.tokens import BOS, EOS, decode
from diffusion import DiscreteDiffusion
from evaluate import main
from kinds.autoregressive import Autoregressive
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from measuring import condition_texts, quality
from measuring.condition_likelihood import (
    ARMS,
    by_cross_attention,
    by_prompt,
    gain,
    prompted_bound,
    text_bound,
)
from measuring.condition_pairs import Pairs
from measuring.condition_texts import names_and_nouns, taken_up
from network.encoders import TextEncoder
from network.layers import ModelConfig

ENCODER = TextEncoder(ModelConfig(width=32, heads=2, layers=1, vocab_size=400, max_len=64))


@pytest.fixture
def pairs(pairs_dir, checkpoint):
    tokenizer = tokenizer_from_checkpoint(load_checkpoint(checkpoint))
    return Pairs(TokenRows(pairs_dir, "val"), ENCODER, tokenizer, 256)


def test_names_and_nouns_are_found_where_they_stand():
    found = names_and_nouns(sample_stories(400))
    assert {"lily", "tom", "scarf", "ball", "bench", "garden"} <= found
    assert not {"the", "and", "little", "happy", "wanted", "said", "then", "was", "old"} & found


def test_take_up_is_the_share_of_the_wanted_words():
    wanted = {"lily", "key", "dog", "berries"}
    assert taken_up(["Lily has a key.", "A big dog ate berries."],
                    ["Lily's keys were old.", "The cat ran."], wanted) == pytest.approx(2 / 4)
    assert taken_up(["Nothing"], ["else"], wanted) == 0


def test_training_words_of_conditions_do_not_run_into_the_texts(pairs_dir, checkpoint, monkeypatch):
    tokenizer = tokenizer_from_checkpoint(load_checkpoint(checkpoint))
    seen = []
    monkeypatch.setattr(condition_texts, "names_and_nouns", lambda texts: seen.extend(texts))
    rows = TokenRows(pairs_dir, "train")
    condition_texts.training_words(rows, ENCODER, tokenizer, limit=5)
    assert seen == [decode(tokenizer, rows.conditions()[i]) + "\n" + decode(tokenizer, rows[i])
                    for i in range(5)]


def test_pairs_fit_into_a_row_with_their_condition(pairs_dir, pairs):
    rows = TokenRows(pairs_dir, "val")
    assert 10 < len(pairs) <= len(rows)
    for i in range(len(pairs)):
        start, row = pairs.starts[i], pairs.prompted[i]
        assert row[0] == BOS and row[-1] == EOS and len(row) <= 256
        assert row[1:start].tolist() == pairs.conditions[i].tolist()
        assert row[start:].tolist() == pairs.texts[i][1:].tolist()
    few = pairs.some([2, 0])
    assert len(few) == 2 and few.numbers == [pairs.numbers[2], pairs.numbers[0]]


def test_the_arms_share_their_masks(pairs, checkpoint):
    """A network that sees nothing of what differs scores all arms alike."""
    model = small_conditional(vocab_size=400, max_len=256)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # tokens do not see one another
    pairs = pairs.some(range(12))
    model.encode = lambda conditions: None
    same = (model, pairs, pairs.shuffled(3))
    arms = (by_cross_attention(DiscreteDiffusion(), *same, draws=2, seed=3).arms
            | by_prompt("plain prompt", DiscreteDiffusion(), *same, draws=2, seed=3).arms)
    assert list(arms) == ["its own condition", "another story's", "no condition", "as a prompt",
                          "another story's, as a prompt", "no condition, plain"]
    for arm in arms.values():
        assert arm.total_nats == pytest.approx(arms["no condition"].total_nats, rel=1e-5)
        assert arm.row_nats()[1].sum() == sum(len(text) - 2 for text in pairs.texts)
        assert gain(arms["no condition"], arm) == pytest.approx((0, 0), abs=1e-5)


def test_shuffled_pairs_keep_their_texts(pairs):
    mismatched = pairs.shuffled(seed=1)
    assert all(a is b for a, b in zip(mismatched.texts, pairs.texts, strict=True))
    assert sorted(map(tuple, mismatched.conditions)) == sorted(map(tuple, pairs.conditions))
    assert not any(a is b for a, b in zip(mismatched.conditions, pairs.conditions, strict=True))
    for condition, start, row, text in zip(mismatched.conditions, mismatched.starts,
                                           mismatched.prompted, mismatched.texts, strict=True):
        assert row[1:start].tolist() == condition.tolist()
        assert row[start:].tolist() == text[1:].tolist()


def test_the_twin_is_scored_exactly_behind_a_prompt(pairs, twin):
    """Its nats are those of the whole row less those of the prompt."""
    model = model_from_checkpoint(load_checkpoint(twin, kind="autoregressive"))
    pairs = pairs.some(range(3))
    bound = prompted_bound(Autoregressive(), model, pairs, 1, 0)
    for i, (row, start) in enumerate(zip(pairs.prompted, pairs.starts, strict=True)):
        whole, prompt = (float(Autoregressive().nelbo(model, [part[None]]).nats[0])
                         for part in (row, row[:start]))
        assert bound.row_nats()[0][i] == pytest.approx(whole - prompt, rel=1e-4)
    assert bound.row_nats()[1].tolist() == [len(text) - 2 for text in pairs.texts]


def test_the_twin_is_scored_exactly_without_a_condition(pairs, twin):
    """-log p of the text alone, its [EOS] counted as in the arms behind a prompt."""
    model = model_from_checkpoint(load_checkpoint(twin, kind="autoregressive"))
    pairs = pairs.some(range(3))
    bound = text_bound(Autoregressive(), model, pairs, 1, 0)
    behind = prompted_bound(Autoregressive(), model, pairs, 1, 0)
    for i, text in enumerate(pairs.texts):
        tokens = torch.from_numpy(text)[None]
        log_p = model(torch.nn.functional.pad(tokens[:, :-1], (1, 0))).detach().log_softmax(-1)[0]
        nats = -sum(float(log_p[j, text[j]]) for j in range(1, len(text)))
        assert text[-1] == EOS and bound.row_nats()[0][i] == pytest.approx(nats, rel=1e-4)
    assert np.array_equal(bound.row_nats()[1], behind.row_nats()[1])
    assert np.array_equal(np.unique(bound.row), np.unique(behind.row))


def test_perplexity_behind_a_condition_counts_the_end(pairs, twin, checkpoint):
    """As that of stories without one does: one definition under one name."""
    model = model_from_checkpoint(load_checkpoint(twin, kind="autoregressive"))
    tokenizer = tokenizer_from_checkpoint(load_checkpoint(checkpoint))
    pairs = pairs.some(range(3))
    nats, tokens = prompted_bound(Autoregressive(), model, pairs, 1, 0).row_nats()
    figures = condition_texts.figures(pairs.texts, pairs, tokenizer, set(), model)
    assert figures["generative_perplexity"] == pytest.approx(
        math.exp(nats.sum() / (tokens + 1).sum()), rel=1e-4)


def test_the_prompted_arm_hides_the_text_alone(pairs):
    hidden = []

    class Spy(torch.nn.Module):
        def hidden(self, tokens, t=None):
            hidden.append((tokens, t))
            return torch.zeros(*tokens.shape, 1)

        def scores(self, states, targets):
            return torch.ones(len(targets)), torch.zeros(len(targets))
    pairs = pairs.some([0, 1])
    bound = prompted_bound(DiscreteDiffusion(), Spy(), pairs, draws=3, seed=0)
    assert bound.nats_per_token == pytest.approx(1.0)
    for tokens, _ in hidden:
        for row in tokens.numpy():
            which = [i for i in range(2) if np.array_equal(
                row[:pairs.starts[i]], pairs.prompted[i][:pairs.starts[i]])]
            assert which and 1 in row[pairs.starts[which[0]]:]


def test_a_gain_is_paired_row_by_row():
    model = small_conditional()
    tokens = np.array([[BOS, 7, 8, 9, EOS, *[0] * 11], [BOS, 10, 11, EOS, *[0] * 12]])
    a = DiscreteDiffusion().nelbo(model, [tokens], draws=4)
    b = DiscreteDiffusion().nelbo(model, [tokens], draws=4)
    b.nats = b.nats + 0.5 * b.k
    mean, error = gain(a, b)
    assert mean == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-9)


def test_the_evaluation_of_a_conditional_model(conditional_checkpoint, checkpoint, twin,
                                               pairs_dir, tmp_path, capsys):
    target = tmp_path / "evaluation.json"
    main(["condition", "--checkpoint", str(conditional_checkpoint), "--twin", str(twin), "--plain",
          str(checkpoint), "--output", str(target), "--steps", "3", "--num_samples", "4",
          "--guidances", "0", "1", "2", "--draws", "2", "--max_rows", "12", "--precision", "fp32"])
    result, text = json.loads(target.read_text()), capsys.readouterr().out
    assert list(result["generation"]) == ["real texts", "guidance 0", "guidance 1", "guidance 2",
                                          "as a prompt"]
    for name, arm in result["likelihood"].items():
        assert 3 < arm["nats_per_token"] < 10 and arm["bits_per_byte"] > 0
        assert ("gain" in arm) == (name != "its own condition")
    own, other = (result["likelihood"][name]["nats_per_token"]
                  for name in ("its own condition", "another story's"))
    assert result["likelihood"]["another story's"]["gain"] == pytest.approx(other - own)
    for name, true in ((name, own) for own, *others in list(ARMS.values())[1:] for name in others):
        arm, base = result["likelihood"][name], result["likelihood"][true]
        assert arm["gain"] == pytest.approx(arm["nats_per_token"] - base["nats_per_token"])
    # each reader with its own, another's and no condition, and both gains, in file and table
    assert list(result["readers"]) == ["cross-attention", "plain prompt", "prompt to the twin"]
    for reader, figures in result["readers"].items():
        own, another, none = (result["likelihood"][arm] for arm in ARMS[reader])
        for name, arm in (("own", own), ("another", another), ("none", none)):
            assert figures[name] == arm["nats_per_token"]
            if name != "own":
                assert figures[f"gain_over_{name}"] == pytest.approx(
                    arm["nats_per_token"] - own["nats_per_token"])
                assert figures[f"gain_over_{name}_standard_error"] == arm["gain_standard_error"] > 0
        line = next(line for line in text.splitlines() if line.startswith(f"| {reader} |"))
        assert line.count("±") == 5 and f"{figures['gain_over_none']:.3f}" in line
    way = result["better_way"]
    assert result["readers"][way["way"]]["own"] < result["readers"][way["than"]]["own"]
    assert f"to tell the model a condition: {way['way']}" in text and way["by"] > 0
    for line in result["generation"].values():
        assert 0 <= line["train_overlap_16"] <= line["train_overlap_8"] <= 1
    assert result["generative_perplexity_is"] == quality.PERPLEXITY
    real = result["generation"]["real texts"]
    assert real["bleu"] == pytest.approx(100) and real["chrf"] == pytest.approx(100)
    assert 0.3 < real["take_up"] <= 1 and 1 < real["generative_perplexity"] < math.inf
    assert "| guidance 2 |" in text and "| as a prompt |" in text
    sheet = target.with_suffix(".md").read_text()
    assert sheet.count("**") == 8 and sheet.count("> guidance 1:") == 4
    # the plain model is that of which the conditional one was made
    main(["condition", "--checkpoint", str(conditional_checkpoint), "--output", str(target),
          "--num_samples", "0", "--draws", "2", "--max_rows", "12", "--precision", "fp32"])
    again = json.loads(target.read_text())
    assert again["generation"] == {}
    # without --plain the prompt is read by the model itself, whose decoder is the plain model
    assert again["likelihood"]["no condition, plain"]["nats_per_token"] == (
        again["likelihood"]["no condition"]["nats_per_token"])
    assert list(again["readers"]) == ["cross-attention", "plain prompt"]
    assert again["likelihood"]["as a prompt"] == pytest.approx(result["likelihood"]["as a prompt"])


@pytest.mark.parametrize(("words", "message"), [
    (["--samplers", "random"], "unrecognized arguments: --samplers"),
    (["--guidance", "2"], "unrecognized arguments: --guidance"),
    (["--guidances", "-1"], "must be 0 or more"),
    (["--guidances", "1", "nan"], "must be 0 or more"),
    (["--max_rows", "1"], "compared with that of another row"),
    (["--output", "x.md"], "the sheet of texts gets that name"),
    (["--twin", "nowhere.pt"], "no checkpoint nowhere.pt")])
def test_bad_flags(words, message, conditional_checkpoint, fails):
    assert message in fails(main, "condition", "--checkpoint", conditional_checkpoint, *words)


def test_a_model_of_shorter_rows_cannot_stand_beside(conditional_checkpoint, twin, fails, tmp_path):
    short = load_checkpoint(twin, kind="autoregressive")
    short["model_config"]["max_len"] = 64
    torch.save(short, tmp_path / "short.pt")
    assert "was trained on rows of at most 64 tokens, this model on up to 256" in fails(
        main, "condition", "--checkpoint", conditional_checkpoint, "--twin", tmp_path / "short.pt",
        "--output", tmp_path / "x.json")


def test_flags_of_conditions_belong_to_models_with_one(checkpoint, twin, fails):
    for flags in (["--guidances", "1", "2"], ["--plain", "x.pt"]):
        assert f"unrecognized arguments: {flags[0]}" in fails(
            main, "--checkpoint", checkpoint, *flags)
    for path in (checkpoint, twin):
        assert "it has no condition; use `python evaluate.py likelihood`" in fails(
            main, "condition", "--checkpoint", path, "--guidances", "1", "2")
