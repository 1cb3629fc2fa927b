"""Stage 2: token shards -> checkpoints.

    python train.py --quick                         # a very small model on made-up stories
    python train.py --model_config small            # TinyStories, prepared first if it is missing
    python train.py --model_config small --resume   # go on after a stop or a kill
    python train.py --objective autoregressive      # the causal twin, for comparison
    python train.py --objective joint               # left to right, in blocks and by whole rows
    python train.py --objective draft --init_from checkpoints/best.pt --checkpoint_dir drafts
    python train.py --stage 2 --decoder_checkpoint checkpoints/best.pt \
        --data_dir data_pairs --checkpoint_dir conditional       # a condition in, a story out
    torchrun --nproc_per_node 2 train.py --model_config small    # several processes (DDP)
    torchrun --nproc_per_node 8 train.py --model_config xxlarge --fsdp    # weights spread (FSDP2)

Writes into `--checkpoint_dir`: last.pt (everything needed to resume), best.pt (lowest validation
NELBO), final.pt, metrics.jsonl and training_curves.png. Prints the validation figures and two
stories at every validation. A step of the small model on 4,096 tokens takes about 1.7 s on 2 CPU
cores with AVX512-BF16, and 0.03 s on an H100 (0.04 s for 16,384 tokens).

The validation figures are computed with the averaged (EMA) weights, always on the same rows and
with the same masks, whose number is uniform over 1..n: NELBO in nats/token, bits/byte (with the
code length of the row lengths), and the plain masked cross-entropy and accuracy over all hidden
tokens.
"""

from cli import check_writable, parse, require, run

import dataclasses
from pathlib import Path

from corpus.rows import load_meta
from corpus.sources import check_source, describe_source, other_source
from data_prep import DataConfig, prepare
from kinds.checkpoints import load_checkpoint
from training.config import QUICK, QUICK_DATA, TrainConfig, refuse_changes
from training.processes import Processes, start_processes
from training.saving import clear_folder
from training.trainer import Trainer


def resumed_config(config: TrainConfig, given: set[str]) -> tuple[TrainConfig, dict]:
    """The stored settings of last.pt with the flags given now on top, and the checkpoint."""
    path = Path(config.checkpoint_dir) / "last.pt"
    require(path.is_file(), f"--resume: no {path} to continue from")
    checkpoint = load_checkpoint(path, kind=None)
    require("optimizer" in checkpoint, f"{path} holds no optimizer state: only a last.pt that "
                                       "train.py wrote can be resumed")
    stored = dataclasses.asdict(TrainConfig()) | checkpoint["train_config"]
    changed = {name: getattr(config, name) for name in sorted(given - {"resume", "checkpoint_dir",
                                                                       "quick"})
               if getattr(config, name) != stored[name]}
    refuse_changes(stored, changed, config.checkpoint_dir)
    for name, value in changed.items():
        if name not in ("data_dir", "data_source"):  # whose content is compared
            print(f"--{name} changes from {stored[name]} to {value}")
    settings = {**stored, **{name: getattr(config, name) for name in given}}
    settings.update(checkpoint_dir=config.checkpoint_dir, resume=True, overwrite=False)
    merged = TrainConfig(**settings)
    merged.check_used(given)
    return merged, checkpoint


def find_data(config: TrainConfig, given: set[str]) -> None:
    """Makes the data folder if there is none; one made from another source is refused."""
    if (Path(config.data_dir) / "meta.json").exists():
        if "data_source" in given:
            check_stories(config)
        return
    require(config.stage == 1, f"no data in {config.data_dir}: prepare conditions and texts with "
                               "prep_conditional_data.py, and name that folder with --data_dir")
    print(f"no data in {config.data_dir}: preparing it from {', '.join(config.data_source)}")
    prepare(DataConfig(source=config.data_source, data_dir=config.data_dir,
                       **(QUICK_DATA if config.quick else {})))


def check_stories(config: TrainConfig) -> None:
    """Refuses a --data_source that is not what the data folder's training stories came from."""
    check_source(config.data_source, None)
    meta = load_meta(config.data_dir)
    if "sources" in meta:  # its files of validation and test stories have no flag here
        meta["sources"] = [source for source in meta["sources"]
                           if source.get("flag", "--source") == "--source"]
    other = other_source(meta, describe_source(config.data_source))
    require(not other, f"{config.data_dir}: {other}; name another --data_dir or leave out "
                       "--data_source")


def make_trainer(config: TrainConfig, given: set[str], processes: Processes) -> Trainer:
    """A trainer at its start or where last.pt stopped; nothing of an older run is touched yet."""
    if config.resume:
        settings, checkpoint = resumed_config(config, given)
        if "data_source" in given:
            processes.agree(lambda: check_stories(settings))
        return Trainer(settings, checkpoint, processes)
    folder = Path(config.checkpoint_dir)
    check_writable(folder, "--checkpoint_dir")
    source = config.decoder_checkpoint
    require(source is None or Path(source).resolve().parent != folder.resolve(),
            f"--checkpoint_dir {folder}: --decoder_checkpoint lies there and would be replaced; "
            "name another folder")
    if not config.overwrite:
        clear_folder(folder, overwrite=False)
    processes.agree(lambda: find_data(config, given))
    return Trainer(config, None, processes)


def main(argv: list[str] | None = None) -> None:
    config, given = parse(TrainConfig, __doc__, argv)
    if config.quick:
        own_folder = "checkpoint_dir" not in given and not config.resume
        config = dataclasses.replace(config, overwrite=config.overwrite or own_folder, **{
            name: value for name, value in QUICK.items() if name not in given})
    config.check()
    if not config.resume:
        config.check_used(given)
    with start_processes(config.device) as processes:
        make_trainer(config, given, processes).run()


if __name__ == "__main__":
    run(main)
