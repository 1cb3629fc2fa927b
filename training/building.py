"""What a stage of training works with: its rows, the kind of model, and the network on its device.
A library: training/trainer.py builds with it what its steps and validations need.
"""

from cli import require

import copy
import dataclasses
from pathlib import Path

import torch

from corpus.rows import TokenRows, content_hashes, read_tokenizer_file
from corpus.tokens import load_tokenizer
from kinds.checkpoints import check_tokenizer, load_checkpoint, model_from_checkpoint
from kinds.kind import NETWORK_SETTINGS, Kind, averaged
from kinds.registry import kind_of_run
from model import DiffusionTransformer
from network.hardware import pick_precision, precision_reason
from training.compiling import compile_blocks
from training.config import TrainConfig
from training.processes import LossOf, Processes, shard

COMPILE_FROM = 1000  # steps; compiling takes about as long as it saves in 100 to 400 of them


class StageData:
    """The rows of a data folder and their tokenizer.

    A `checkpoint` that is gone on from must have been trained on the same (UserError).
    """

    def __init__(self, config: TrainConfig, checkpoint: dict | None = None):
        self.rows, self.valid = (TokenRows(config.data_dir, split) for split in ("train", "val"))
        self.meta = self.rows.meta
        if checkpoint:
            check_tokenizer(Path(config.checkpoint_dir, "last.pt"), checkpoint, config.data_dir,
                            self.meta)
            check_same_data(checkpoint.get("data"), config, self.meta)
        require(config.batch_tokens >= self.meta["seq_len"], f"--batch_tokens "
                f"{config.batch_tokens}: a row of the data has up to {self.meta['seq_len']} tokens")
        self.tokenizer_text = read_tokenizer_file(config.data_dir, self.meta)
        self.tokenizer = load_tokenizer(self.tokenizer_text)


class StageModel:
    """The model of a stage and its averaged weights, on their device and in their precision.

    `average` is `model` itself where nothing is averaged; `loss_of` makes the training loss of a
    batch and is what several processes have in common; `kind` is the kind of model. `conditions`
    and `valid_conditions` are those of the data's rows, None for a kind without any.
    """

    def __init__(self, config: TrainConfig, data: StageData, processes: Processes,
                 checkpoint: dict | None = None):
        self.config, self.processes, self.device = config, processes, processes.device
        self.compiled = False
        torch.manual_seed(config.seed)
        self.precision, self.precision_reason = choose_precision(config, processes, checkpoint)
        self.kind = kind_of_run(config)
        self.model = create_stage_model(self.kind, config, data, checkpoint)
        self.conditions, self.valid_conditions = (
            self.model.encoder.conditions_of(rows, config.decoder_checkpoint)
            if self.kind.conditional else None for rows in (data.rows, data.valid))
        self.model.set_precision(self.precision)
        if checkpoint:
            self.model.load_state_dict(checkpoint["weights"])
        self.average = copy.deepcopy(self.model).eval() if config.ema_decay else self.model
        if checkpoint and self.average is not self.model:
            self.average.load_state_dict(checkpoint.get("ema") or checkpoint["weights"])
        self.teachers = [open_teacher(path, self.kind, data).set_precision(self.precision)
                         .for_inference().to(self.device) for path in config.teachers]
        self.distribute()

    def distribute(self) -> None:
        """Puts the model on its device and, of several processes, into their common work."""
        config, several = self.config, self.processes.world > 1
        require(several or not config.fsdp, "--fsdp spreads a model over several processes: start "
                                            "them with torchrun --nproc_per_node N train.py ...")
        require(not (config.fsdp and self.model.self_conditioning), "--fsdp: with "
                "self-conditioning some rows take a pass more, and processes that share their "
                "weights must all take as many; leave it out")
        require(not config.fsdp or self.precision != "fp16",
                "--fsdp works with --precision bf16 or fp32, not fp16")
        for model in {id(m): m for m in (self.model, self.average)}.values():
            if config.fsdp:
                shard(model, self.device)
            model.to(self.device)
        self.loss_of = LossOf(self.kind, self.model, self.teachers)
        if several and not config.fsdp:
            carry = self.model.carry  # is not used where none of a process's rows has a first pass
            self.loss_of = torch.nn.parallel.DistributedDataParallel(
                self.loss_of, gradient_as_bucket_view=True, broadcast_buffers=False,  # none changes
                find_unused_parameters=carry is not None and carry.weight.requires_grad)

    def compile(self, length: int) -> None:
        """Compiles the blocks, for rows of up to `length` tokens, where that is asked for or pays;
        says why where it cannot."""
        config = self.config
        if config.compile is False or (config.compile is None
                                       and config.max_steps < COMPILE_FROM):
            return
        reason = compile_blocks(self.model, self.device, length)
        require(reason is None or config.compile is None, f"--compile: {reason}; leave it out")
        if reason and self.processes.main:
            print(f"not compiled, the steps will be slower: {reason}", flush=True)
        self.compiled = reason is None

    def synchronise_gradients(self, wanted: bool) -> None:
        """Whether the coming backward passes average the gradients over the processes."""
        if self.config.fsdp:
            self.model.set_requires_gradient_sync(wanted)
        elif self.processes.world > 1:
            self.loss_of.require_backward_grad_sync = wanted


def choose_precision(config: TrainConfig, processes: Processes,
                     checkpoint: dict | None) -> tuple[str, str]:
    """The precision to compute in, and why; a run keeps its own on the same kind of device."""
    # Rank 0 chooses for all: a timing may come out otherwise in another process.
    before, device = (checkpoint or {}).get("computed_in", {}), processes.device
    choice = (config.precision,
              before.get("precision") if before.get("device") == device.type else None)
    return processes.gather((pick_precision(device, *choice), precision_reason(device, *choice))
                            if processes.main else None)[0]


def create_stage_model(kind: Kind, config: TrainConfig, data: StageData,
                       checkpoint: dict | None) -> DiffusionTransformer:
    """The network of a stage; that of a `checkpoint` of this very run gets its weights later.

    From stage 2 on `config` takes over the settings of the model that it starts from.
    """
    source = checkpoint
    if kinds := kind.starts_from(config.stage):
        source = checkpoint or load_checkpoint(config.decoder_checkpoint, kind=kinds)
        check_tokenizer(config.decoder_checkpoint, source, config.data_dir, data.meta)
        for name in NETWORK_SETTINGS:  # for the record, and for whoever goes on from this run
            setattr(config, name, source["train_config"][name])
    begins = None
    if config.init_from and checkpoint is None:
        begins = load_checkpoint(config.init_from, kind.init_kinds)
        check_tokenizer(config.init_from, begins, config.data_dir, data.meta)
        for name in kind.keeps_settings:
            setattr(config, name, begins["train_config"][name])
    model = kind.create(config, data.meta, source, resumed=checkpoint is not None)
    if config.stage > 1 and model.config.lora_rank:  # of this run or of the model gone on with
        config.lora_rank, config.lora_alpha = model.config.lora_rank, model.config.lora_alpha
        config.lora_targets = model.config.adapted
    if begins:
        start_from(model, config, begins)
    model.train_only(kind.trained(config.stage))
    return model


def open_teacher(path: str, kind: Kind, data: StageData) -> DiffusionTransformer:
    """A model of the same kind and vocabulary, of any size."""
    checkpoint = load_checkpoint(path, kind.name)
    check_tokenizer(path, checkpoint, "the data", data.meta)
    model = model_from_checkpoint(checkpoint)
    require(model.config.max_len >= data.meta["seq_len"], f"--teachers {path}: its rows have up to "
            f"{model.config.max_len} tokens, those of the data {data.meta['seq_len']}")
    if kind.conditional:  # it reads these conditions, or says why it cannot
        model.encoder.conditions_of(data.rows, path)
    return model


# Of a network's settings what may differ between a model and the one that it starts from
OWN_SETTINGS = ("causal", "dropout", "max_len", "draft_rank", "self_conditioning")


def start_from(model: DiffusionTransformer, config: TrainConfig, source: dict) -> None:
    """Gives a new model the averaged weights of another run's checkpoint, but for a draft head; a
    matrix for self-conditioning that the other has not stays at zero."""
    theirs, ours = source["model_config"], dataclasses.asdict(model.config)
    different = [name for name in ours if name not in OWN_SETTINGS
                 and ours[name] != theirs.get(name, ours[name])]
    require(not different, f"--init_from {config.init_from}: its model is not of the size of "
            f"--model_config {config.model_config}, or has other settings ({', '.join(different)})")
    weights = averaged(source)
    missing, strange = model.load_state_dict({
        name: weight for name, weight in weights.items() if not name.startswith("draft.")},
        strict=False)
    parts = [name for name in missing if not name.startswith(("draft.", "carry."))]
    parts += [name for name in strange if not name.startswith("draft.")]
    require(not parts, f"--init_from {config.init_from}: its model has other parts "
                       f"({', '.join(parts[:3])})")
    if model.draft is not None:
        model.draft.start_from_vocabulary()


def check_same_data(known: dict | None, config: TrainConfig, meta: dict) -> None:
    """Refuses to go on with other rows than those whose hashes a run has `known`: its place in the
    data and its best validation would mean nothing, and rows of training might be validated on.
    The folder's path does not matter."""
    here = content_hashes(meta)
    known = known or here  # an older checkpoint has none
    different = [split for split in here if split.removesuffix("_condition") != "test"
                 and here[split] != known.get(split)]
    require(not different, f"{config.data_dir} has other content than the run in "
            f"{config.checkpoint_dir} was trained on ({', '.join(different)}): name that data "
            "folder with --data_dir, or begin another run with another --checkpoint_dir")
