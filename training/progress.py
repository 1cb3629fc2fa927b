"""How far a run has come. A library: what checkpoints, log and training steps share of it."""

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What a run counts; its checkpoints hold every field."""

    step: int = 0  # optimizer steps taken
    tokens_seen: int = 0  # without padding
    seconds: float = 0.0  # of training, in all sessions
    best: float = math.inf  # lowest validation likelihood, nats/token
    metrics: dict = field(default_factory=dict)  # of the last validation

    @classmethod
    def of(cls, checkpoint: dict, valid_rows: int) -> "Progress":
        """That of the content of a last.pt, for a run that validates on `valid_rows` rows."""
        same_rows = checkpoint["train_config"]["valid_rows"] == valid_rows
        return cls(checkpoint["step"], checkpoint["tokens_seen"], checkpoint["seconds"],
                   checkpoint["best"] if same_rows else math.inf, checkpoint["metrics"])
