import json
import math

import numpy as np
import pytest
import torch

import train
from data_prep import BOS, EOS, TokenRows
from evaluate import main
from quality import SAMPLERS, Judge, diversity, ends_properly, entropy, settings, table, words
from sampler import ADAPTIVE_PACES, Sampler


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
            assert sampler.temperature == 0.7
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
    train.Trainer(train.TrainConfig(
        data_dir=str(long_data_dir), checkpoint_dir=str(folder), model_config="micro", max_steps=3,
        batch_tokens=1024, precision="fp32", device="cpu", valid_every=3, valid_rows=4,
        num_samples=0, objective="autoregressive")).run()
    return folder / "best.pt"


def test_the_table_of_samplers(checkpoint, twin, long_data_dir, tmp_path, capsys, fails):
    target = tmp_path / "sampling.json"
    argv = ["--checkpoint", str(checkpoint), "--data_dir", str(long_data_dir), "--sampling",
            "--num_samples", "3", "--evaluations", "2", "5", "--output", str(target), "--samplers",
            "random", "random, corrector", "entropy, entropy_bound"]
    main([*argv, "--judge", str(twin), "--precision", "fp32"])
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
    assert result["data"]["end_properly"] == 1  # every made-up story ends with a full stop
    # without a judge there is no perplexity, and everything else
    main(argv)
    result = json.loads(target.read_text())
    assert result["data"]["generative_perplexity"] is None and "| real stories |  |  |  | " in (
        capsys.readouterr().out)
    assert "of the kind diffusion, where one of the kind autoregressive" in fails(main, *argv, "--judge", checkpoint)
    assert "it has no samplers" in fails(main, *argv, "--checkpoint", twin)
