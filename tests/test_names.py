import numpy as np
import pytest
import torch

import train
from corpus.names import NameSwap, find_names
from corpus.tokens import BOS, EOS, pad_rows
from training.loader import BatchLoader

TEXTS = ["", "", "", "", " Tom", "Tom", " Ben", "Ben", " Sam", " Lily", "Lily", " Mia", "Mia",
         " ran", ".", " he", " she", " and", " Mom", " Once", " Dog", "The"]
ID = {text: i for i, text in enumerate(TEXTS)}


def row(*texts: str) -> np.ndarray:
    return np.array([BOS, *(ID[text] for text in texts), EOS])


STORIES = [row("The", " Tom", " and", " Ben", " ran", ".", " he", " and", " Sam", " ran", "."),
           row("Tom", " and", " Mom", " ran", ".", " Once", " he", " ran", " and", " Tom", "."),
           row("Lily", " ran", ".", " she", " and", " Lily", " and", " Mia", " ran", "."),
           row(" Dog", " ran", " and", " Dog", ".", " he", " and", " she", " ran", ".")] * 8


def names(group) -> list[str]:
    return [TEXTS[i] for i in group.spaced]


def test_names_are_found_with_their_side_and_no_other_words_are():
    boys, girls = find_names(STORIES, TEXTS)
    assert names(boys) == [" Ben", " Sam", " Tom"] and names(girls) == [" Lily", " Mia"]
    assert boys.plain.tolist() == [ID["Ben"], -1, ID["Tom"]]
    # Mom is what somebody is, Once and The begin sentences, Dog belongs to neither side


def test_names_change_everywhere_in_a_row_and_nothing_else_does():
    groups = find_names(STORIES, TEXTS)
    tokens = np.stack([story for story in STORIES[:2] * 100])
    swapped = NameSwap(groups, 1.0)(tokens, np.random.default_rng(0))
    seen = set()
    for before, after in zip(tokens, swapped, strict=True):
        pairs = {(TEXTS[a].strip(), TEXTS[b].strip()) for a, b in zip(before, after, strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert {a for a, b in pairs if a != b} <= {"Tom", "Ben", "Sam"}
        # a space before a name stays where it was, and only there
        assert all(TEXTS[a].startswith(" ") == TEXTS[b].startswith(" ")
                   for a, b in zip(before, after, strict=True))
        seen |= {b for a, b in pairs if a == "Tom"}
        if TEXTS[before[1]] == "Tom":
            assert TEXTS[after[1]] in ("Tom", "Ben")  # Sam has no token without a space
    assert seen == {"Tom", "Ben", "Sam"}


def test_a_share_of_the_rows_and_only_of_the_given_ones():
    groups = find_names(STORIES, TEXTS)
    tokens = np.stack([STORIES[0]] * 2000)
    same = NameSwap(groups, 0.0)(tokens, np.random.default_rng(0))
    assert np.array_equal(same, tokens) and same is not tokens
    changed = (NameSwap(groups, 0.4)(tokens, np.random.default_rng(0)) != tokens).any(1).mean()
    # of six equally likely orders of three names one is the old one; weights differ a little
    assert 0.4 * 0.7 < changed < 0.4 * 0.95


def test_a_group_of_one_name_keeps_it():
    boys, girls = find_names(STORIES, TEXTS)
    alone = boys._replace(spaced=boys.spaced[2:], plain=boys.plain[2:], weight=boys.weight[2:])
    tokens = np.stack(STORIES[:2])
    assert np.array_equal(NameSwap([alone, girls], 1.0)(tokens, np.random.default_rng(0)), tokens)


def test_training_batches_with_other_names_depend_on_seed_and_step_alone():
    swap = NameSwap(find_names(STORIES, TEXTS), 0.5)

    def loader(step=0, cursor=None, swap=swap):
        return BatchLoader(Rows(), 64, 3, lambda tokens, generator: Plain(tokens), step, cursor,
                           swap=swap)
    first, plain = loader(), loader(swap=None)
    batches = [first.next() for _ in range(6)]
    untouched = [plain.next().corrupted.tokens for _ in range(6)]
    assert any(not torch.equal(a.corrupted.tokens, b)
               for a, b in zip(batches, untouched, strict=True))
    assert all(a.corrupted.tokens.shape == b.shape
               for a, b in zip(batches, untouched, strict=True))
    later = loader(3, batches[2].cursor)
    for batch in batches[3:]:
        assert torch.equal(later.next().corrupted.tokens, batch.corrupted.tokens)


class Rows:
    lengths = np.array([len(story) for story in STORIES])

    def __len__(self) -> int:
        return len(STORIES)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        return pad_rows([STORIES[i] for i in indices])


class Plain:
    predicted = 1

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens


@pytest.mark.parametrize("flags", [["--swap_names", "1.5"], ["--swap_names", "-0.1"],
                                   ["--stage", "2", "--swap_names", "0.5",
                                    "--decoder_checkpoint", "x.pt"]])
def test_flags_that_are_refused(flags, fails):
    assert "--swap_names" in fails(train.main, *flags)


def test_data_without_names_of_one_token_is_refused(data_dir, tmp_path, fails):
    error = fails(train.main, "--swap_names", 0.5, "--data_dir", data_dir, "--checkpoint_dir",
                  tmp_path / "run", "--model_config", "micro", "--batch_tokens", 512)
    assert "--swap_names: no two names" in error and not (tmp_path / "run").exists()
