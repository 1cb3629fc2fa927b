import json
import math

import numpy as np
import pytest
import torch
from conftest import TableModel

from corpus.rows import TokenRows
from corpus.tokens import BOS, EOS, MASK, decode, load_tokenizer
from diffusion import DiscreteDiffusion
from evaluate import main
from kinds.autoregressive import Autoregressive
from kinds.likelihood import ratio_error
from measuring import overlap, quality
from measuring.coherence import late_names, repeated, sentences
from measuring.infilling import hide_middle, middle_sentence
from measuring.overlap import train_overlap
from measuring.quality import Judge, diversity, ends_properly, entropy, words
from measuring.samplers import COLUMNS, SAMPLERS, settings, table
from network.layers import ModelConfig
from sampling.sampler import ADAPTIVE_PACES, Sampler
from training import config, trainer


def test_diversity_of_known_texts():
    same = diversity(["the cat sat on the mat"] * 2, [[9, 10, 11, 12, 9, 13]] * 2)
    assert same["distinct_1"] == 5 / 12 and same["distinct_2"] == 5 / 10
    assert same["distinct_3"] == 4 / 8 and same["self_bleu"] == pytest.approx(100)
    assert same["unigram_entropy"] == pytest.approx(
        -(4 / 6 * math.log(1 / 6) + 2 / 6 * math.log(2 / 6)))
    assert same["tokens_per_story"] == 6
    other = diversity(["a dog ran far away", "birds sing in tall trees"], [[4, 5], [6, 7]])
    assert other["distinct_1"] == 1 and other["self_bleu"] < 10
    assert entropy([5, 5, 5]) == 0
    assert words('"Don\'t," said Tom.') == ["don't", "said", "tom"]


def test_a_proper_end_is_the_end_of_a_sentence():
    for text in ("It was fun.", 'He said, "Yes!"', "What? ", "\u201cBye.\u201d\n"):
        assert ends_properly(text)
    for text in ("It was", "and so on,", "", '"'):
        assert not ends_properly(text)


def test_every_sampler_makes_sense_at_every_cost():
    for name in SAMPLERS:
        kinds = list(settings(Sampler(temperature=0.7), name, (4, 16)))
        for sampler in kinds:
            sampler.check()
            assert sampler.temperature == SAMPLERS[name].get("temperature", 0.7)
        adaptive = kinds[0].pace in ADAPTIVE_PACES
        assert len(set(kinds)) == len(kinds) == (6 if adaptive else 2)
        assert {sampler.steps for sampler in kinds} == ({16} if adaptive else {4, 16})


class Coin(torch.nn.Module):
    """A twin that gives every one of 8 tokens the same probability, but token 4 twice as much."""

    def hidden(self, tokens, t=None, context=None):
        return torch.zeros(*tokens.shape, 1)

    def scores(self, hidden, targets):
        return -torch.where(targets == 4, 2 / 9, 1 / 9).log(), targets == 4


def test_the_judge_counts_the_end_too():
    rows = [np.array([BOS, 5, 6, EOS]), np.array([BOS, 4, EOS])]
    nats = -(4 * math.log(1 / 9) + math.log(2 / 9))
    assert Judge(Coin()).perplexity(rows) == pytest.approx(math.exp(nats / 5))


@pytest.fixture(scope="module")
def twin(long_data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    trainer.Trainer(config.TrainConfig(
        data_dir=str(long_data_dir), checkpoint_dir=str(folder), model_config="micro", max_steps=3,
        batch_tokens=1024, precision="fp32", device="cpu", valid_every=3, valid_rows=4,
        num_samples=0, objective="autoregressive")).run()
    return folder / "best.pt"


def test_the_judge_takes_what_stands_before_as_given():
    """[EOS] counts here too: perplexities of texts with and without a prompt are of one kind."""
    rows = [np.array([BOS, 7, 7, 4, 6, EOS]), np.array([BOS, 4, EOS])]
    nats = -(4 * math.log(1 / 9) + math.log(2 / 9))  # of 4, 6, [EOS] and 4, [EOS]
    assert Judge(Coin()).perplexity(rows, [3, 1]) == pytest.approx(
        math.exp((nats - math.log(2)) / 5))


# ---- what stands in the training text ------------------------------------------------------------

class Rows(list):
    """Training rows as `train_overlap` reads them."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self])


@pytest.mark.parametrize("chunk", [1, 7, 50, 2**20])
def test_the_share_in_the_training_text_is_exact(chunk, monkeypatch):
    """Against a set of tuples: few different tokens, so that many n-grams stand in several places,
    and rows without [BOS] and [EOS], whose n-grams must not run on into the next row."""
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(0)
    train = Rows(rng.integers(4, 6, size=rng.integers(3, 30)).astype(np.uint16) for _ in range(6))
    groups = [[rng.integers(4, 6, size=size).tolist() for size in (20, 11, 2)] for _ in range(3)]
    groups.append([[4, 5]])  # no text is long enough

    def grams(text, n: int) -> list[tuple]:
        return [tuple(map(int, text[i:i + n])) for i in range(len(text) - n + 1)]
    sizes = (3, 5, 8)
    there = {n: {gram for row in train for gram in grams(row, n)} for n in sizes}
    for group, shares in zip(groups, train_overlap(groups, train, sizes), strict=True):
        for n in sizes:
            mine = [gram for text in group for gram in grams(text, n)]
            expected = sum(gram in there[n] for gram in mine) / len(mine) if mine else None
            assert shares[f"train_overlap_{n}"] == pytest.approx(expected)
    joined = [int(token) for row in train for token in row]  # crosses the rows
    share, = train_overlap([[joined]], train, (8,))
    assert 0 < share["train_overlap_8"] < 1


def test_training_stories_stand_in_the_training_text_and_others_mostly_not(long_data_dir):
    train, held_out = (TokenRows(long_data_dir, split) for split in ("train", "val"))
    learned, other = train_overlap([quality.text_ids([rows[i] for i in range(5)])
                                    for rows in (train, held_out)], train)
    assert learned == {"train_overlap_8": 1.0, "train_overlap_16": 1.0}
    assert other["train_overlap_16"] < other["train_overlap_8"] < 1


# ---- infilling -----------------------------------------------------------------------------------

def test_the_middle_sentence():
    text = 'Tom ran. He said, "Hi!" Then it rained... He slept.'
    assert text[slice(*middle_sentence(text))] == "Then it rained..."
    text = 'One day. "Go!" she said. End'
    assert text[slice(*middle_sentence(text))] == "she said."
    assert middle_sentence("One. Two.") is None and middle_sentence("") is None


def test_hiding_the_middle_sentence_hides_its_tokens_and_no_more(long_data_dir):
    tokenizer = load_tokenizer((long_data_dir / "tokenizer.json").read_text())
    rows = TokenRows(long_data_dir, "val")
    for i in range(len(rows)):
        row = rows[i].astype(np.int64)
        gap = hide_middle(row, tokenizer)
        hidden = gap == MASK
        assert np.array_equal(gap[~hidden], row[~hidden]) and 0 < hidden.sum() < len(row) - 2
        positions = np.flatnonzero(hidden)
        assert np.array_equal(positions, np.arange(positions[0], positions[-1] + 1))
        whole = decode(tokenizer, row[1:-1])
        assert decode(tokenizer, row[hidden]).strip() == whole[slice(*middle_sentence(whole))]


def test_nats_of_a_gap_are_those_given_what_is_seen():
    """A twin of known probabilities, and the enumerable network with one and two hidden tokens."""
    coin = Coin()
    coin.config = ModelConfig(causal=True)
    rows = [np.array([BOS, 4, 5, 6, EOS])]
    gaps = [np.array([BOS, MASK, MASK, 6, EOS])]
    assert Autoregressive().gap_nats(coin, *rows, *gaps) == pytest.approx(
        -(math.log(2 / 9) + math.log(1 / 9)))
    table = TableModel()
    table.config = ModelConfig()
    last = [np.array([BOS, 4, MASK, 6, EOS])]
    first, second, both = (table.probabilities(seen) for seen in (
        (MASK, 5, 6), (4, MASK, 6), (MASK, MASK, 6)))
    diffusion = DiscreteDiffusion()
    for nats in (diffusion.gap_bound(table, *rows, *last, 1, 0, 0),
                 diffusion.gap_nats(table, *rows, *last)):
        assert nats == pytest.approx(-math.log(second[1, 1]), rel=1e-5)
    # two tokens: the mean over both orders
    orders = [-math.log(both[0, 0] * second[1, 1]), -math.log(both[1, 1] * first[0, 0])]
    assert diffusion.gap_bound(table, *rows, *gaps, 4000, 0, 0) == pytest.approx(
        sum(orders) / 2, rel=0.03)
    # exactly, from the left
    assert diffusion.gap_nats(table, *rows, *gaps) == pytest.approx(orders[0], rel=1e-5)


def test_infilling_of_both_sides(checkpoint, twin, long_data_dir, tmp_path, capsys):
    target = tmp_path / "infilling.json"
    main(["infilling", "--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir),
          "--num_samples", "4", "--steps", "3", "--twin", str(twin), "--output", str(target),
          "--precision", "fp32", "--draws", "2"])
    text, result = capsys.readouterr().out, json.loads(target.read_text())
    assert set(result["arms"]) == {"this model", "left to right"} and result["stories"] == 4
    for arm in result["arms"].values():
        assert 0 <= arm["exact_match"] <= 1 and 0 <= arm["bleu"] <= 100
        assert 2 < arm["nats_per_token"] < 7 and len(arm["examples"]) == 4
        assert f"{arm['nats_per_token']:.3f}" in text
        assert all(example["real"] for example in arm["examples"])
        nats, tokens = np.array(arm["story_nats"]), np.array(result["story_tokens"])
        assert arm["nats_per_token"] == pytest.approx(nats.sum() / tokens.sum())
        assert arm["standard_error"] == pytest.approx(ratio_error(nats, tokens)) and (
            f"{arm['nats_per_token']:.3f} ± {arm['standard_error']:.3f}" in text)
    mine, other = (np.array(arm["story_nats"]) for arm in result["arms"].values())
    difference = result["difference"]
    assert difference["nats_per_token"] == pytest.approx((mine - other).sum() / tokens.sum())
    # paired: that of the two arms as if they had other stories would be larger
    assert difference["standard_error"] == pytest.approx(ratio_error(mine - other, tokens))
    assert f"{difference['nats_per_token']:+.3f} ± {difference['standard_error']:.3f}" in text
    # every story that fits may be asked for, and without a twin there is no difference
    main(["infilling", "--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir),
          "--num_samples", "1000", "--steps", "1", "--output", str(target), "--draws", "1"])
    result = json.loads(target.read_text())
    assert "difference" not in result and 4 < len(result["story_tokens"]) == result["stories"]


# ---- the table of samplers -----------------------------------------------------------------------

def test_a_low_entropy_is_named():
    figures = {key: 1.0 for _, key, _ in COLUMNS}
    lines = [{"name": name, "evaluations": 4, "sampler": {"pace": "linear"},
              **figures, "unigram_entropy": entropy}
             for name, entropy in (("varied", 0.975), ("alike", 0.965))]
    text = table({"data": figures, "samplers": lines}).splitlines()
    assert ["↓" in line for line in text] == [False, False, False, False, True]


def test_the_table_of_samplers(checkpoint, twin, long_data_dir, tmp_path, capsys, fails):
    target = tmp_path / "sampling.json"
    argv = ["samplers", "--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir),
            "--num_samples", "3", "--evaluations", "2", "5", "--output", str(target), "--samplers",
            "random", "random, corrector", "entropy, entropy_bound"]
    main([*argv, "--twin", str(twin), "--precision", "fp32"])
    text, result = capsys.readouterr().out, json.loads(target.read_text())
    assert (tmp_path / "sampling_pareto.png").stat().st_size > 5000
    assert table(result) in text and text.count("\n| ") == 2 + 2 + 2 + 6
    lines = result["samplers"]
    assert [line["evaluations"] for line in lines[:2]] == [2, 5]
    assert all(line["evaluations"] <= 5 for line in lines)
    # it is the lengths of the real stories that are filled
    assert all(line["tokens_per_story"] == result["data"]["tokens_per_story"] for line in lines)
    rows = TokenRows(long_data_dir, "val")
    assert result["data"]["tokens_per_story"] <= rows.lengths.max() - 2
    for figures in (result["data"], *lines):
        assert 50 < figures["generative_perplexity"] < 3000
        assert 0 <= figures["end_properly"] <= 1
        assert 0 <= figures["train_overlap_16"] <= figures["train_overlap_8"] <= 1
    assert result["generative_perplexity_is"] == quality.PERPLEXITY and quality.PERPLEXITY in text
    assert "| 8 in train | 16 in train |" in text
    assert result["data"]["end_properly"] == 1  # every made-up story ends with a full stop
    # without a judge there is no perplexity, and everything else
    main(argv)
    result = json.loads(target.read_text())
    assert result["data"]["generative_perplexity"] is None and "| real stories |  |  |  | " in (
        capsys.readouterr().out)
    assert "needed here is of the kind: autoregressive model" in fails(main, *argv, "--twin",
                                                                     checkpoint)
    assert "it has no samplers" in fails(main, *argv, "--checkpoint", twin)


# ---- whether a story holds its thread ------------------------------------------------------------

def test_repeated_is_the_share_of_4_grams_that_stand_earlier():
    assert repeated("a b c d".split()) == 0
    assert repeated("a b c d a b c d".split()) == 1 / 5
    assert repeated(["a"] * 9) == 5 / 6
    assert repeated("a b c".split()) == 0  # none at all


@pytest.mark.parametrize("text, names", [
    ("Once there was Tom. He ran far away from home. Then a girl named Lily came.", {"Lily"}),
    ("Once there was a girl named Lily. She ran far away. Then Lily came.", set()),
    # what only begins sentences and quotations is no name
    ('Once there was a dog. He ran far. Then he said, "Stop!" She ran. Sad and wet.', set()),
    # nor what follows a quotation, with straight marks or curved ones
    ('Once a dog ran. He ran far. Then "go," She said, "go," She said. Wet and sad.', set()),
    ("Once a dog ran. He ran far. Then \u201cgo,\u201d She said. Wet and sad again.", set()),
    ("", set())])
def test_a_late_name_is_first_seen_in_the_second_half(text, names):
    assert late_names(text) == names


def test_a_sentence_takes_its_quotation_mark_with_it():
    texts = ["", "", "", "", "Hi", " you", ".", '"', ' "', '!"', " x"]
    ids = np.array([BOS, 8, 4, 5, 6, 7, 4, 9, 10, EOS])  # ' "Hi you."', 'Hi!"', ' x'
    parts = sentences(ids, texts)
    assert ["".join(texts[i] for i in ids[part]) for part in parts] == [
        ' "Hi you."', 'Hi!"', " x"]
    assert sentences(np.array([BOS, EOS]), texts) == []


def test_improbable_sentences_are_those_beyond_nearly_all_real_ones():
    """Of the real sentences one in a hundred may be: here of 200 the two that lack the token that
    the judge likes."""
    class Texts:
        def get_vocab_size(self):
            return 8

        def decode(self, ids):
            return {(7,): "."}.get(tuple(ids), "x")

    usual, strange = [4, 4, 4, 7], [5, 5, 5, 7]
    real = [np.array([BOS, *usual * 198, EOS]), np.array([BOS, *strange * 2, EOS])]
    judge = Judge(Coin(), real)
    assert judge.improbable([np.array([BOS, *usual, *strange, EOS])], Texts()) == 1 / 2
    assert judge.improbable(real, Texts()) == 1 / 100
    assert judge.improbable([np.array([BOS, EOS])], Texts()) is None
