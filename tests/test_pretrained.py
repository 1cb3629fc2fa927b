"""The weights that come with the repository, and exactly what they write in FP32.

    python tests/test_pretrained.py        # after new weights: writes golden.json again

A story that changes without new weights is a mistake in network, samplers, noise or tokenizer: all
of them have a part in it.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import generate
from kinds.checkpoints import PRETRAINED, load_checkpoint

GOLDEN = Path(__file__).with_name("golden.json")
GAP = "Lily had a red ball. [MASK:8] She was very happy."
CASES = {
    "drafts of the head": [],
    "another seed, a prompt": ["--seed", "1", "--prompt", "One day, a big d"],
    "token by token": ["--block_size", "1", "--temperature", "1"],
    "drafts of the network": ["--verify", "--steps", "2", "--block_size", "8"],
    "blocks": ["--block_size", "16", "--steps", "4"],
    "whole rows": ["--steps", "12", "--temperature", "1"],
    "whole rows, the surest first": ["--steps", "12", "--order", "confidence", "--top_p", "0.9"],
    "a gap": ["--infill", GAP],
}


def written(flags: list[str]) -> list[list[int]]:
    """Token ids of two stories."""
    length = [] if "--infill" in flags else ["--length", "48"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        generate.main(["--checkpoint", str(PRETRAINED), "--num_samples", "2", "--device", "cpu",
                       "--json", *length, *flags])
    return [json.loads(line)["tokens"] for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_the_same_seed_writes_exactly_these_tokens(name):
    assert written(CASES[name]) == json.loads(GOLDEN.read_text())[name]


def test_one_file_of_bf16_weights_that_clones_quickly():
    assert [path.suffix for path in sorted(PRETRAINED.parent.iterdir())] == [".md", ".pt"]
    assert PRETRAINED.stat().st_size <= 30e6
    checkpoint = load_checkpoint(PRETRAINED, "joint")
    assert {weight.dtype for weight in checkpoint["weights"].values()} == {torch.bfloat16}
    assert "CDLA-Sharing-1.0" in (PRETRAINED.parent / "README.md").read_text()


def test_it_speaks_where_nobody_has_trained_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generate.main(["--num_samples", "1", "--length", "12"])
    out, error = capsys.readouterr()
    assert PRETRAINED.name in out.splitlines()[-1] and "comes with the repository" in error


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: written(flags) for name, flags in CASES.items()}) + "\n")
