"""Stage 4: how good a checkpoint is, in numbers.

    python evaluate.py --checkpoint checkpoints/best.pt --data_dir data
    python evaluate.py --checkpoint checkpoints/best.pt --sampling --twin checkpoints_ar/best.pt
    python evaluate.py --checkpoint checkpoints/best.pt --infilling --twin checkpoints_ar/best.pt
    python evaluate.py --checkpoint conditional/best.pt --twin checkpoints_ar/best.pt

What was chosen (the best checkpoint, learning rates, presets) was chosen on the validation split;
what is reported here comes from the test split, where the data folder has one. The protocol names
the split.

Prints a table and writes evaluation.json beside the checkpoint:
- the likelihood bound (NELBO) of held-out stories in bits/byte, nats/token and perplexity, with
  its standard error, and masked cross-entropy and accuracy by mask ratio
- distinct-1/2/3, self-BLEU and unigram entropy of samples, and the share of their 8-grams and
  16-grams (of tokens) that stand in the training text, beside those of real stories
With --sampling it compares the samplers instead, at each number of network evaluations: a table,
sampling.json and sampling_pareto.png (see quality.py). With --infilling it fills in the middle
sentence of real stories: exact match, BLEU, nats/token with the paired difference from the twin,
and infilling.json. It shows its progress;
--num_samples makes it shorter, and --max_rows the scoring. The autoregressive twin is scored on the
same bytes, exactly: its "NELBO" is the negative log-likelihood.
Of a model with a condition it tells what the condition is worth, at every guidance (see
conditioning.py), and writes a sheet of ten texts, evaluation.md.
"""

from cli import check_writable, parse, require, run

import dataclasses
from pathlib import Path

from kinds.checkpoints import find_checkpoint, load_checkpoint
from measuring.common import EvaluateConfig
from measuring.conditions import evaluate_conditional
from measuring.infilling import compare_infilling
from measuring.likelihood import write
from measuring.samplers import compare_samplers, plot_beside
from sampling.sampler import Sampler


def check_used(config: EvaluateConfig, kind: str, given: set[str]) -> None:
    """Refuses flags that were given and would change nothing."""
    drawing = {"temperature", "top_k", "top_p"}
    sampler = {field.name for field in dataclasses.fields(Sampler)} - drawing
    compared, told = {"samplers", "evaluations"}, {"guidance", "guidances", "plain"}
    if kind == "conditional":
        unused = compared | {"sampling", "infilling", "guidance"}
        why = "for a model with a condition"
    else:
        unused, why = ((sampler | {"draws", "max_rows"}, "with --sampling") if config.sampling else
                       (compared | {"max_rows"}, "with --infilling") if config.infilling else
                       (compared, "without --sampling"))
        require(not told & given, f"--{' --'.join(sorted(told & given))}: without effect for a "
                                  "model without a condition; leave it out")
    if kind == "autoregressive":
        unused, why = unused | sampler | {"draws"}, "for an autoregressive model"
    unused = sorted(unused & given)
    require(not unused, f"--{' --'.join(unused)}: without effect {why}; leave it out")
    require(config.twin is None or config.sampling or config.infilling or kind == "conditional",
            "--twin is for --sampling and --infilling, and for models with a condition")
    if kind != "autoregressive":
        config.check_used(given)


def main(argv: list[str] | None = None) -> None:
    config, given = parse(EvaluateConfig, __doc__, argv)
    config.check()
    path = find_checkpoint(config.checkpoint, "diffusion" if config.sampling else (
        "diffusion", "autoregressive") if config.infilling else None)
    checkpoint = load_checkpoint(path, kind=None)
    check_used(config, checkpoint["kind"], given)
    name, do = (("sampling.json", compare_samplers) if config.sampling else
                ("infilling.json", compare_infilling) if config.infilling else
                ("evaluation.json", evaluate_conditional) if checkpoint["kind"] == "conditional"
                else
                ("evaluation.json", write))
    target = Path(config.output) if config.output else path.parent / name
    require(target.parent.is_dir() and not target.is_dir(),
            f"--output {target}: name a file in a folder that exists")
    beside = (plot_beside(target) if config.sampling else
              target.with_suffix(".md") if checkpoint["kind"] == "conditional" else target)
    require(not beside.is_dir(), f"--output {target}: {beside}, which is written too, is a folder; "
                                 "name another file")
    check_writable(target.parent, "--output")
    do(config, path, checkpoint, target)


if __name__ == "__main__":
    run(main)
