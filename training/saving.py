"""The files of a run and what a full disk does to it. A library: training/trainer.py writes
checkpoints with it, and train.py asks whether a folder is free."""

from cli import describe, is_of_the_machine, require

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from training.processes import Processes

OUTPUTS = ("last.pt", "best.pt", "final.pt", "metrics.jsonl", "training_curves.png")


class Saver:
    """Writes checkpoints into the folder of a run, and bears that the disk is full for a while.

    `saved_step` is the step that the folder's last.pt holds, None if there is none.
    """

    def __init__(self, folder: Path, processes: Processes, saved_step: int | None = None):
        self.folder, self.processes, self.saved_step = folder, processes, saved_step
        self.failed = 0  # writes of last.pt, in a row

    def write(self, name: str, step: int, write: Callable[[Path], None], resumable: bool,
              give_up: bool) -> bool:
        """Has the main process `write` the checkpoint `name` of a step; a collective call.

        A file that the disk does not take leaves the one before as it is, and training goes on;
        when the next `resumable` one fails too, or with `give_up`, UserError. Returns whether it
        was written.
        """
        problem = None
        if self.processes.main:
            try:
                write(self.folder / name)
            except OSError as error:
                problem = not_written(error, step, give_up or resumable and self.failed)
        problem = self.processes.gather(problem)[0]
        if resumable:
            self.failed = self.failed + 1 if problem else 0
            self.saved_step = self.saved_step if problem else step
        there = ("there is no last.pt yet" if self.saved_step is None else
                 f"{self.folder / 'last.pt'} holds step {self.saved_step}")
        require(not problem or not (give_up or self.failed > 1), f"{problem}, at step {step}; "
                f"{there}: free some space, then " + (
                    "try again" if self.saved_step is None else "--resume"))
        return not problem


def not_written(error: OSError, step: int, ends: bool = False) -> str:
    """Says that a file could not be written, and why, unless the run `ends` with it; returns it.
    A bug stays one."""
    if not is_of_the_machine(error):
        raise error
    if not ends:
        tqdm.write(f"step {step}: not written: {describe(error)}; training goes on and tries again "
                   "at the next save", file=sys.stderr)
    return describe(error)


def clear_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a run; with `overwrite` removes that run's files."""
    old = [folder / name for name in OUTPUTS if (folder / name).exists()]
    require(overwrite or not old, f"{folder} already holds a run: continue it with --resume, or "
                                  "give --overwrite or another --checkpoint_dir")
    for path in old:
        path.unlink()


def clear_partial(folder: Path) -> None:
    """Removes what runs left that were killed while they wrote; the folder is locked."""
    for name in OUTPUTS:
        for path in folder.glob(f"{name}.*.partial"):
            path.unlink()
