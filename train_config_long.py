"""The settings of a long run, its presets, and what its folder keeps of them. A library:
`python train_long.py --help` shows all.

Everything that train.py can set is here too, and lands in the checkpoint; a preset replaces the
defaults of the flags that were not given.
"""

from cli import UserError, flag, preset, require, write_json

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep import DataConfig
from kinds.checkpoints import OLDER_RUN
from sampling.sampler import Sampler
from training.config import TrainConfig

STAGES = ("data", "train", "evaluate", "curves", "samples", "report")
# Where the data lies; what is in it is compared by its hashes.
PLACES = {"data_dir", "data_source", "valid_source"}


@dataclass
class LongConfig(TrainConfig):
    preset: str = flag("laptop", "laptop (2 CPU cores, an hour), gpu16gb (one 16 GB GPU) or full "
                                 "(several GPUs)", ("laptop", "gpu16gb", "full"))
    # the run
    checkpoint_dir: str = flag("long_run", "folder for everything that the run writes")
    data_dir: str | None = flag(None, "data folder (default: data/ in that folder)")
    minutes: float = flag(0.0, "choose max_steps so that the whole run takes about so long on this "
                               "machine, measured at its start; 0: max_steps as it is given")
    from_stage: str | None = flag(None, "do this stage and those after it again: "
                                        + ", ".join(STAGES), STAGES)
    skip_data_prep: bool = flag(False, "use the data folder as it is, and stop if there is none")
    # data
    valid_source: str | None = flag(None, "file with the validation stories (local sources)")
    vocab_size: int = flag(8192, "size of the vocabulary")
    seq_len: int = flag(256, "longest row in tokens, a multiple of 16")
    # validation while training
    valid_every: int = flag(0, "steps between validations; 0: ten of them in the run")
    save_every: int = flag(100, "steps between writes of last.pt")
    # the closing evaluation and stories
    draws: int = flag(4, "masks drawn for every held-out row")
    evaluate_rows: int = flag(0, "held-out rows scored, spread over the split; 0: all")
    compared_stories: int = flag(64, "stories compared with real ones in diversity")
    written_stories: int = flag(10, "stories in samples.md, unpicked")
    written_steps: int = flag(256, "their unmasking steps")

    def check(self) -> None:
        self.train_config(valid_every=self.valid_every or 1).check()
        require(not self.quick, "--quick belongs to train.py; choose a --preset here")
        require(self.stage == 1, f"--stage {self.stage} belongs to train.py")
        self.story_sampler().check()
        require(self.minutes < math.inf, f"--minutes {self.minutes}: must be a number")
        for name in ("draws", "written_steps"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("minutes", "evaluate_rows", "compared_stories", "written_stories"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must be 0 or more")
        require(self.compared_stories != 1, "--compared_stories 1: self-BLEU needs 2 or more")

    def data_config(self) -> DataConfig:
        return DataConfig(source=self.data_source, valid_source=self.valid_source,
                          data_dir=self.data_dir, vocab_size=self.vocab_size, seq_len=self.seq_len)

    def train_config(self, **changes) -> TrainConfig:
        """What train.py would be given for the training stage."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names} | changes)

    def story_sampler(self) -> Sampler:
        return dataclasses.replace(self.sampler(), steps=self.written_steps)


PRESETS = {
    # 2 CPU cores, under an hour though other programs run too; the slice or a corpus of its size
    "laptop": dict(model_config="small", batch_tokens=4096, minutes=50.0, evaluate_rows=3000),
    # an RTX 5060 Ti: some hours over all of TinyStories (about 475 M tokens an epoch)
    "gpu16gb": dict(model_config="medium", batch_tokens=65_536, grad_accum_steps=2,
                    max_steps=15_000, ema_decay=0.999, valid_rows=2048, save_every=500),
    # torchrun --nproc_per_node 8 train_long.py --preset full
    "full": dict(model_config="xlarge", batch_tokens=524_288, grad_accum_steps=2, max_steps=20_000,
                 ema_decay=0.9995, valid_rows=4096, save_every=500),
}


class KeptSettings:
    """settings.json of a run: its settings, its sessions, and the hashes of its data.

    `config` has the stored settings of the folder's run, or the preset, and the `given` flags on
    top. `changed` names the given ones that the run had otherwise; `say` is told of them.
    """

    NOT_KEPT = dict(from_stage=None, skip_data_prep=False, overwrite=False, resume=False)

    def __init__(self, config: LongConfig, given: set[str], say: Callable[[str], None]):
        folder = Path(config.checkpoint_dir)
        self.path = folder / "settings.json"
        self.sessions: list[dict] = []
        self.changed: set[str] = set()
        self.known_data: dict | None = None  # hashes of what the run was trained on
        require(not {"minutes", "max_steps"} <= given,
                "--minutes and --max_steps: give one of them")
        require(not config.resume or (folder / "last.pt").exists(),
                f"--resume: no {folder / 'last.pt'} to continue from")
        config.check_used(given)
        if self.path.exists() and not config.overwrite:
            config = self.go_on(config, given, say)
        else:
            require(config.overwrite or not (folder / "last.pt").exists(),
                    f"{folder} holds a run of train.py: name another --checkpoint_dir, or "
                    "give --overwrite")
            settled = given | ({"minutes"} if "max_steps" in given else set())
            config = preset(config, PRESETS[config.preset], settled)
        if config.data_dir is None:
            config.data_dir = str(folder / "data")
        config.check()
        self.config = config

    def go_on(self, config: LongConfig, given: set[str], say: Callable[[str], None]) -> LongConfig:
        """The stored settings with the given flags on top; sets what else is stored."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            base, self.sessions = stored["settings"], stored["sessions"]
            self.known_data = stored.get("data")
            asked = {name: getattr(config, name) for name in given}
            config = LongConfig(**{**OLDER_RUN, **base, **asked})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} does not hold a run's settings; name another "
                            "--checkpoint_dir, or give --overwrite") from error
        self.changed = {name for name in given - set(self.NOT_KEPT)
                        if base.get(name) != getattr(config, name)}
        require("preset" not in self.changed, f"--preset {config.preset}: the run in "
                f"{self.path.parent} was started with {base['preset']}; name another "
                "--checkpoint_dir, or give --overwrite")
        for name in sorted(self.changed - PLACES):
            say(f"--{name} changes from {base.get(name)} to {getattr(config, name)}")
        if "max_steps" in given:
            config.minutes = 0.0
        return config

    def store(self) -> None:
        """Writes settings.json, whole or not at all; makes the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = dataclasses.replace(self.config, **self.NOT_KEPT)
        write_json(self.path, {"settings": dataclasses.asdict(kept), "sessions": self.sessions,
                               "data": self.known_data})
