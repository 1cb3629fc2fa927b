"""Stage 5: a checkpoint -> ONNX steps in FP32, FP16 and INT8, and the folder to copy to a Jetson.

    python export_jetson.py --checkpoint long_run/best.pt --data_dir long_run/data
    python export_jetson.py --checkpoint conditional/best.pt --guided   # both sides in a step
    python export_jetson.py --check rtx --out_dir jetson_bundle         # NVIDIA's compiler, no GPU

then copy `--out_dir` to the Jetson and there, in the folder:

    pip install -r requirements-jetson.txt      # TensorRT itself comes with JetPack
    python export_jetson.py --build_engine step_fp16.onnx
    python generate.py --engine step_fp16.engine --preset fast

What is exported is one unmasking step, network and choice of tokens (jetson/step_graph.py): logits
never leave it. Each precision comes with a report, printed and kept in bundle.json: size,
operators, difference of the logits, agreement of the likeliest token and the NELBO of held-out rows
through that very graph: of the test split where the data has one, else of the validation split.
INT8 takes its scales from training rows. The small model takes about 3 minutes on 2 CPU cores.

Of a joint model (block_diffusion.py) there is a second graph in each precision, cached_*.onnx: a
pass of up to --cached_tokens tokens behind a cache of what is finished, causal or in a block. It
gives logits; whoever writes from the left draws from them (jetson/reader.py). Build an engine of it
in the same way, and then `python generate.py --engine cached_fp16.engine --verify --stream`.
"""

from cli import parse, require, run

import sys
from importlib.util import find_spec
from pathlib import Path

from jetson.engine_builder import build_engine, check_rtx
from jetson.settings import ExportConfig


def main(argv: list[str] | None = None) -> None:
    config, _ = parse(ExportConfig, __doc__, argv)
    config.check_values()
    if config.build_engine:
        build_engine(Path(config.build_engine), config.workspace_mb)
    elif config.check:
        check_rtx(Path(config.out_dir))
    else:
        require(find_spec("onnx") and find_spec("torch"), "an export needs torch and onnx, which "
                "are not here: run it where the model was trained; here give --build_engine")
        from cli.folders import make_folder

        from jetson.bundle import export
        make_folder(config.out_dir, "--out_dir", config.overwrite,
                    lambda folder: export(config, folder), marker="bundle.json")
        size = sum(path.stat().st_size for path in Path(config.out_dir).rglob("*")) / 1e6
        print(f"wrote {config.out_dir}, {size:.1f} MB: copy it to the device, its README.md says "
              "how to go on", file=sys.stdout)


if __name__ == "__main__":
    run(main)
