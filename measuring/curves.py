"""The training curves of one run, or the validations of several in one figure.

    python evaluate.py curves --checkpoint_dir checkpoints    # draws training_curves.png again
    python evaluate.py curves --compare checkpoints checkpoints_ar --output diffusion_vs_ar.png

--compare draws the best validation bits/byte so far of several runs against epochs over the data.
Needs no torch.
"""

from cli import atomic_file, check_writable, flag, parse, require

import itertools
from dataclasses import dataclass
from pathlib import Path

from training.log import MetricsLog


def best_so_far(lines: list[dict]) -> tuple[list[float], list[float], list[float]]:
    """Epochs, bits/byte and the lowest bits/byte until then, of each validation."""
    points = [(line["epoch"], line["valid_bits_per_byte"]) for line in lines
              if "valid_bits_per_byte" in line]
    epochs, values = ([point[i] for point in points] for i in (0, 1))
    return epochs, values, list(itertools.accumulate(values, min))


def compare(folders: list[Path], output: Path) -> None:
    """Draws the runs in `folders` into one figure: the best so far, and faintly each validation."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for folder in folders:
        epochs, values, best = best_so_far(MetricsLog(folder).lines())
        require(epochs, f"{folder} has no validation in its metrics.jsonl yet")
        line, = axis.plot(epochs, best, marker=".", label=f"{folder.name} (best {best[-1]:.3f})")
        axis.plot(epochs, values, color=line.get_color(), alpha=0.3)
    axis.set_xlabel("epochs over the training data")
    axis.set_ylabel("best validation bits/byte")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_file(output) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


@dataclass
class CurvesConfig:
    """Flags of `evaluate.py curves`."""

    checkpoint_dir: str = flag("checkpoints", "folder of the run")
    compare: list[str] = flag([], "folders of runs to draw into one figure instead")
    output: str = flag("comparison.png", "that figure")


def main(argv: list[str]) -> None:
    config, given = parse(CurvesConfig, __doc__, argv)
    require(config.compare or "output" not in given, "--output belongs to --compare; the curves of "
                                                     "one run go into its folder")
    folders = [Path(name) for name in config.compare or [config.checkpoint_dir]]
    for folder in folders:
        require(MetricsLog(folder).path.is_file(),
                f"no {MetricsLog(folder).path}: name the folder of a run, with --checkpoint_dir or "
                "--compare")
    if config.compare:
        require("checkpoint_dir" not in given,
                "--checkpoint_dir: --compare names the folders; leave it out")
        check_writable(Path(config.output).parent, "--output")
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        compare(folders, Path(config.output))
        print(f"wrote {config.output}")
    else:
        log = MetricsLog(folders[0])
        log.plot()
        print(f"wrote {log.curves}")
