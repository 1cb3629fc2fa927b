"""The settings of an export. A library: `python export_jetson.py --help` shows all."""

from cli import flag, require

from dataclasses import dataclass

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass
class ExportConfig:
    checkpoint: str | None = flag(None, "checkpoint to export (default: the newest */best.pt)")
    out_dir: str = flag("jetson_bundle", "folder to write")
    precisions: list[str] = flag(list(PRECISIONS), "which graphs: " + ", ".join(PRECISIONS))
    length: int | None = flag(None, "tokens of a row, a multiple of 16 (default: the model's)")
    batch: int = flag(1, "rows of a step")
    dynamic: bool = flag(False, "any number of rows and any length, up to --batch and --length, in "
                                "one graph (TensorRT likes fixed shapes better)")
    cached_tokens: int = flag(32, "a model that writes from the left: tokens of a pass behind the "
                                  "cache, at most; the largest --block_size on the device")
    guided: bool = flag(False, "a model with a condition: both sides in one step, for --guidance "
                               "other than 0 and 1 (twice the work)")
    data_dir: str | None = flag(None, "data folder, for INT8's scales and the report (default: "
                                      "that of the training)")
    calibration_rows: int = flag(64, "training rows from which INT8 takes its scales")
    report_rows: int = flag(64, "rows of the report, of the test split or without one of the "
                                "validation split; 0 for none")
    overwrite: bool = flag(False, "replace a bundle that is already there")
    check: str | None = flag(None, "rtx: have NVIDIA's TensorRT-RTX compile every graph of "
                                   "--out_dir (pip install tensorrt-rtx-cu12)", ("rtx",))
    build_engine: str | None = flag(None, "graph to build an engine of, on the device that runs it")
    workspace_mb: int = flag(1024, "memory that TensorRT may use while it builds")

    def check_values(self) -> None:
        for name in self.precisions:
            require(name in PRECISIONS, f"--precisions {name}: choose from {', '.join(PRECISIONS)}")
        for name in ("batch", "cached_tokens", "calibration_rows", "workspace_mb"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.report_rows >= 0, f"--report_rows {self.report_rows}: must be 0 or more")
        require(self.length is None or (self.length >= 16 and self.length % 16 == 0),
                f"--length {self.length}: must be a positive multiple of 16")
        require(not self.dynamic or self.length is None or self.length >= 32,
                f"--length {self.length}: with --dynamic it must be at least 32")
        require(not (self.check and self.build_engine), "--check and --build_engine: choose one")
