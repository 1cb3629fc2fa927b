from itertools import islice

import pytest

from corpus import sample_stories as module
from corpus.sample_stories import sample_stories
from corpus.tokens import sha256


def test_deterministic_distinct_and_a_prefix_of_a_longer_run():
    stories = list(sample_stories(3000))
    assert len(set(stories)) == 3000
    assert list(islice(sample_stories(9), 5)) == stories[:5]
    assert list(sample_stories(5, seed=1)) != stories[:5]
    # the same on every platform and Python version
    assert sha256("\n\n".join(stories).encode()) == (
        "63b46a79b10f616bee4731b52a6468539dc9f25db354b91a02e9653992532cdd")


def test_shape_of_the_stories():
    for story in sample_stories(500, seed=2):
        assert story.isascii() and story == story.strip()
        assert 50 <= len(story.split()) <= 110
        assert story[-1] in '."!' and "{" not in story and "[" not in story
        assert 1 <= story.count("\n") <= 2


def test_command_line(capsys, fails):
    module.main(["--count", "2", "--seed", "3"])
    first, second = capsys.readouterr().out.split("\n<|endoftext|>\n")
    assert [first, second.strip()] == list(sample_stories(2, 3))
    assert "--count" in fails(module.main, "--count", "-1")
    assert "--seed" in fails(module.main, "--seed", "-1")
    for count in (-1, 100_001):
        with pytest.raises(ValueError):
            sample_stories(count)
