"""Stage 4: how good a checkpoint is, in numbers.

    python evaluate.py --checkpoint checkpoints/best.pt            # the same as `likelihood`
    python evaluate.py likelihood --checkpoint checkpoints/best.pt --data_dir data
    python evaluate.py samplers --checkpoint checkpoints/best.pt --twin checkpoints_ar/best.pt
    python evaluate.py infilling --checkpoint checkpoints/best.pt --twin checkpoints_ar/best.pt
    python evaluate.py blocks --checkpoint joint/best.pt --twin ar/best.pt --judge ar2/best.pt
    python evaluate.py condition --checkpoint conditional/best.pt --twin checkpoints_ar/best.pt
    python evaluate.py pictures --checkpoint pictures/best.pt --data_dir data_emoji
    python evaluate.py curves --compare checkpoints checkpoints_ar

likelihood  bits/byte, nats/token and perplexity of held-out stories, diversity of generated ones
samplers    what each sampler gives for its network evaluations
infilling   how well the middle sentence of real stories is filled in
blocks      what each way of writing costs and gives: left to right, in blocks, verified, by rows
condition   what its condition is worth to a conditional model
pictures    what a picture is worth to a model that reads pictures
curves      the training curves of one run, or the validations of several in one figure

What was chosen (the best checkpoint, learning rates, presets) was chosen on the validation split;
what is reported here comes from the test split, where the data folder has one. Each command prints
a table and writes its figures beside the checkpoint; `python evaluate.py NAME --help` says more.
"""

from cli import choose, run

MEASUREMENTS = {name: f"measuring.{name}"
                for name in ("likelihood", "samplers", "infilling", "blocks", "condition",
                         "pictures", "curves")}


def main(argv: list[str] | None = None) -> None:
    choose(__doc__, MEASUREMENTS, argv, default="likelihood")


if __name__ == "__main__":
    run(main)
