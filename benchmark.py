"""Benchmarks, paired: each arm runs in turn in one process, so that a noisy machine is fair to all.

    python benchmark.py train --model_config small --batch 16     # a training step
    python benchmark.py sample --model_config small --batch 4     # the filling of whole stories
    python benchmark.py write --model_config small --batch 4      # writing from the left
    python benchmark.py device --bundle jetson_bundle             # exported steps, where they run
    python benchmark.py roofline --device orin_nano_8gb           # what a device could do at best

`python benchmark.py NAME --help` says more of each. `device` needs no torch.
"""

from cli import choose, run

import sys

BENCHMARKS = {"train": "measuring.training_speed", "sample": "measuring.sampling_speed",
              "write": "measuring.writing_speed",
              "device": "measuring.device", "roofline": "measuring.roofline"}


def main(argv: list[str] | None = None) -> None:
    choose(__doc__, BENCHMARKS, argv)


if __name__ == "__main__":
    # without --json the table is all that there is
    run(main, prints=sys.argv[1:2] != ["device"] and not any(
        word.split("=")[0] == "--json" for word in sys.argv))
