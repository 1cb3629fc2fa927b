"""The log of a run: metrics.jsonl, its training_curves.png, and Weights & Biases. A library: a
training run writes it, train_long.py and measuring/curves.py read it.

metrics.jsonl has one JSON object a line with `step` and whatever was measured then: training lines
every `log_every` steps (loss, lr, grad_norm, tokens_per_second, mfu), validation lines (valid_*),
both with tokens, epoch and seconds.
"""

from cli import UserError, atomic_file, is_of_the_machine

import errno
import json
import os
import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path

# title of a panel, and the metrics that it shows
PANELS = [("nats/token", ("loss", "valid_nelbo")), ("bits/byte", ("valid_bits_per_byte",)),
          ("masked accuracy", ("valid_masked_accuracy",)), ("learning rate", ("lr",))]


class MetricsLog:
    """Appends to metrics.jsonl in `folder`, and to a Weights & Biases run if there is one."""

    def __init__(self, folder: Path, wandb_run=None):
        self.path, self.curves = folder / "metrics.jsonl", folder / "training_curves.png"
        self.wandb_run = wandb_run
        self.waiting = b""  # lines that the disk did not take yet
        self.drawn: list[dict] | None = None  # the lines that training_curves.png shows
        self.failure_reported = False  # so that it is said once

    def write(self, step: int, metrics: dict) -> None:
        """Appends a line; on a full disk it waits for the next one, and no half of it stays."""
        self.waiting += json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                try:
                    if file.write(self.waiting) < len(self.waiting):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self.waiting = b""
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            if not self.failure_reported:
                print(f"{self.path}: {error.strerror}; its lines wait for the next one",
                      file=sys.stderr)
            self.failure_reported = True
        if self.wandb_run:
            self.wandb_run.log(metrics, step=step)

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, which a killed run wrote after its last checkpoint."""
        if not self.path.exists():  # killed before its first line
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_file(self.path, "w") as file:
            file.writelines(line for line in lines
                            if line.endswith("\n") and json.loads(line)["step"] <= step)

    def lines(self) -> list[dict]:
        """What was logged, in its order; without a last line that is cut off."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def plot(self) -> None:
        """Draws training_curves.png, unless it has done so since the last line."""
        lines = self.lines()
        if lines == self.drawn:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
            for key in keys:
                points = [(line["step"], line[key]) for line in lines if key in line]
                style = {"alpha": 0.4} if key == "loss" else {"marker": "."}
                axis.plot(*zip(*points, strict=True) if points else ([], []), label=key, **style)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend()
        with atomic_file(self.curves) as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        self.drawn = lines

    def close(self) -> None:
        """Ends the log; says so if lines of it could not be written."""
        if self.waiting:
            lines = len(self.waiting.splitlines())
            print(f"{self.path} lacks its last {lines} lines", file=sys.stderr)
        if self.wandb_run:
            self.wandb_run.finish()


def start_wandb(config: dict, folder: Path):
    """A Weights & Biases run in `folder`, or None where WANDB_DISABLED says so.

    Its own variables and settings count: WANDB_MODE, WANDB_PROJECT, WANDB_DIR, WANDB_BASE_URL,
    proxies. Only where none of them says how is the server looked for, and without it the run is
    logged offline.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        print("WANDB_DISABLED is set: nothing is logged to Weights & Biases")
        return None
    try:
        import wandb
        settings = wandb.setup().settings
        mode = None if "WANDB_MODE" in os.environ else settings.mode
        if mode == "online" and not reachable(settings.base_url):
            mode = "offline"
            print("no connection to Weights & Biases: logging offline (`wandb sync` uploads it "
                  "later)")
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "diffusion-llm"), mode=mode,
                          dir=os.environ.get("WANDB_DIR", str(folder)), config=config)
    except Exception as error:  # not installed, not logged in, refused by the server, ...
        raise UserError(f"--wandb: {error}; run `wandb login`, or leave --wandb out") from error


def reachable(url: str) -> bool:
    """Whether a server answers; what lies behind a proxy is left to the proxy."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(
            parts.hostname or ""):
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=3).close()
        return True
    except OSError:
        return False
