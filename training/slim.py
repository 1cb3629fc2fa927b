"""A checkpoint with nothing in it but what writes stories: its averaged weights in BF16.

    python -m training.slim --checkpoint story/best.pt --output pretrained/stories_small.pt
    python -m training.slim --adapter --checkpoint pictures/best.pt --output mine.pt

Programs read it as any other checkpoint; a training can begin with it (--init_from), but not go on.
With --adapter only what stage 2 has trained, for the model that it was trained beside.
"""

from cli import atomic_file, check_file, flag, parse, require, run

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinds.adapters import adapter_of
from kinds.checkpoints import load_checkpoint, model_from_checkpoint

# What else is kept: how it came about, without the names of folders
KEPT = ("format", "format_version", "kind", "model_config", "encoder", "encoder_config",
        "tokenizer", "tokenizer_sha256", "length_histogram", "step", "tokens_seen", "seconds",
        "torch_version", "data", "data_source", "licence")
FOLDERS = ("data_dir", "checkpoint_dir", "init_from", "decoder_checkpoint", "data_source",
           "teachers", "image_encoder")


@dataclass(frozen=True)
class SlimConfig:
    checkpoint: str = flag("", "checkpoint to make smaller")
    output: str = flag("", "file to write")
    adapter: bool = flag(False, "of a model of train.py --stage 2: encoder, cross-attention and "
                                "low-rank adapters alone")


def slim(checkpoint: dict) -> dict:
    """The contents of the smaller file. A matrix that two parts share is kept once."""
    model, halved = model_from_checkpoint(checkpoint), {}

    def half(weight: Tensor) -> Tensor:
        return halved.setdefault(weight.data_ptr(), weight.to(torch.bfloat16)
                                 if weight.is_floating_point() else weight)
    return {**{name: checkpoint[name] for name in KEPT if name in checkpoint},
            "train_config": without_folders(checkpoint.get("train_config", {})),
            "weights": {name: half(weight) for name, weight in model.state_dict().items()}}


def without_folders(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in FOLDERS}


def main(argv: list[str] | None = None) -> None:
    config, _ = parse(SlimConfig, __doc__, argv)
    require(config.checkpoint and config.output, "name both --checkpoint and --output")
    target = Path(config.output)
    check_file(target, "--output")
    checkpoint = load_checkpoint(config.checkpoint, None)
    if config.adapter:
        require(checkpoint.get("encoder") and checkpoint.get("train_config", {}).get("stage") == 2,
                f"--adapter: {config.checkpoint} is not of train.py --stage 2, which alone leaves "
                "the model beside it as it was")
        contents = adapter_of(checkpoint)
        contents["train_config"] = without_folders(contents["train_config"])
    else:
        contents = slim(checkpoint)
    with atomic_file(target) as file:
        torch.save(contents, file)
    print(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
