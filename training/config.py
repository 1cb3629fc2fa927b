"""The settings of a training run. A library: `python train.py --help` shows all.

Every field is a flag of the same name and lands in the checkpoint.
"""

from cli import UserError, flag, require

import dataclasses
import math
from dataclasses import dataclass

from diffusion import SCHEDULES
from kinds.kind import NETWORK_SETTINGS
from kinds.registry import KINDS, kind_of_run, objectives, trained_kinds
from model import MODEL_CONFIGS
from network.layers import LORA_TARGETS, MLPS, PRECISIONS
from sampling.sampler import ORDERS, Sampler
from training.optimizers import DEFAULT_LR, OPTIMIZERS

TIMES = 0.2, 0.7  # chosen on validation rows: docs/experiments.md
STAGE_LR = {1: 1.0, 2: 1.0, 3: 2 / 3}  # share of the default: in stage 3 all has learned already
# A run cannot go on with another value of these: the weights, the optimizers' state or the place in
# the data would not fit.
FIXED = (*NETWORK_SETTINGS, "stage", "encoder_config", "image_encoder",
         "decoder_checkpoint", "optimizer", "seed",
         "batch_tokens", "block_sizes", "causal_share", "draft_rank", "draft_size", "lora_rank",
         "lora_alpha", "lora_targets")


@dataclass
class TrainConfig:
    # data and output
    data_dir: str = flag("data", "data folder of data_prep.py; prepared first if it is missing")
    data_source: list[str] = flag(["tinystories"], "what to prepare it from: tinystories, sample "
                                                   "or files")
    checkpoint_dir: str = flag("checkpoints", "folder to write")
    resume: bool = flag(False, "continue from last.pt of the checkpoint folder")
    overwrite: bool = flag(False, "start again in a checkpoint folder that holds a run")
    quick: bool = flag(False, "a very small model on made-up stories, in quick_run/")
    # model
    model_config: str = flag("small", "size: " + ", ".join(MODEL_CONFIGS))
    dropout: float = flag(0.0, "dropout after attention and MLP")
    qk_norm: bool = flag(True, "normalise queries and keys")
    neighbour_init: float = flag(4.0, "how strongly heads look at their neighbours at first; 0 is "
                                      "the usual initialisation")
    time_conditioning: str = flag("none", "input of the mask ratio", ("none", "sinusoidal"))
    tied_head: bool = flag(True, "one matrix for embedding and vocabulary head")
    mlp: str = flag("swiglu", "swiglu or relu2 (the squared ReLU)", MLPS)
    value_residual: bool = flag(True, "mix every block's values with those of the first")
    head_gates: bool = flag(True, "weigh what every head finds")
    self_conditioning: float = flag(0.0, "share of the rows that learn to read what an earlier "
                                         "pass made of them; 0: no self-conditioning")
    # condition
    stage: int = flag(1, "1 trains a model without a condition; 2 adds encoder and cross-attention "
                         "to one and trains only these; 3 then trains everything",
                      (1, 2, 3))
    decoder_checkpoint: str | None = flag(None, "stage 2: the model to start from; stage 3: that "
                                                "of stage 2")
    encoder_config: str | None = flag(None, "stage 2: size of the encoder (default: that of the "
                                            "model, and it starts with the model's weights)")
    image_encoder: str | None = flag(None, "stage 2: what reads the pictures: a .pt file of python "
                                           "-m training.naming, which is trained on, or the .onnx "
                                           "file of a vision model, which stays as it is (default: "
                                           "one that knows nothing yet)")
    condition_dropout: float = flag(0.1, "stage 3, or stage 2 with adapters: share of the rows "
                                         "that are trained without their condition, for guidance "
                                         "(else the model without it cannot change)")
    lora_rank: int = flag(0, "stage 2: rank of adapters beside the model's matrices, which stay as "
                             "they are; 0: none")
    lora_alpha: float | None = flag(None, "what they add is multiplied by alpha / rank (default: "
                                          "twice the rank)")
    lora_targets: list[str] = flag(["query", "key", "value", "out"], "which matrices of a block "
                                   "have one: " + ", ".join(LORA_TARGETS))
    # diffusion
    objective: str = flag("masked_ce", f"training loss: {', '.join(objectives())}; "
                                       "autoregressive trains the causal twin, joint one network "
                                       "that writes from left to right, in blocks and whole rows")
    schedule: str = flag("linear", "mask ratio m(t) in training", tuple(SCHEDULES))
    t_min: float | None = flag(None, "whole rows are trained at times t from here ... (default: "
                                     "0.2; 0 with objective elbo, the cosine schedule or time "
                                     "conditioning)")
    t_max: float | None = flag(None, "... to here: those with few or nearly all tokens hidden "
                                     "teach little (default: 0.7; 1 with those)")
    block_sizes: str = flag("causal,row,row,16,row,row,4,row", "objective joint: how its rows "
                            "take turns: blocks of so many tokens, row (whole), causal (next "
                            "token alone)")
    causal_share: float = flag(0.5, "objective joint: weight of the next-token loss; what is left "
                                    "is that of the hidden tokens")
    flex_attention: bool = flag(False, "objective joint: attention of rows in blocks by "
                                       "FlexAttention; needs a CUDA GPU")
    draft_rank: int = flag(128, "objective draft: rank of the head that is trained")
    draft_size: int = flag(8, "objective draft: tokens of a block that the network drafts, the "
                              "known first one among them")
    teachers: list[str] = flag([], "checkpoints, of the kind of model that is trained and its "
                                   "tokenizer, whose distribution is learned instead of the text's "
                                   "tokens (distillation): one is asked in each step, in turns")
    init_from: str | None = flag(None, "checkpoint whose weights stage 1 starts with, of the same "
                                       "size and tokenizer (default: random ones)")
    # optimisation
    max_steps: int = flag(10_000, "optimizer steps")
    batch_tokens: int = flag(16_384, "tokens of a step, padding included, over all micro-batches")
    grad_accum_steps: int = flag(1, "micro-batches of a step")
    optimizer: str = flag("muon", "muon: the blocks' matrices by Muon, the rest by AdamW",
                          OPTIMIZERS)
    lr: float | None = flag(None, "peak learning rate (default: " + ", ".join(
        f"{lr} for {name}" for name, lr in DEFAULT_LR.items()) + "; two thirds of it in stage 3)")
    warmup_steps: int | None = flag(None, "steps of linear warm-up (default: 5 % of max_steps)")
    min_lr_ratio: float = flag(0.0, "the cosine decay ends at this share of the peak")
    weight_decay: float = flag(0.0, "decoupled weight decay of the blocks' matrices")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")
    ema_decay: float = flag(0.99, "decay of the averaged weights; 0 turns averaging off")
    seed: int = flag(0, "seed of everything random")
    # machine
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", ("auto", *PRECISIONS))
    compile: bool | None = flag(None, "torch.compile the blocks; needs a C++ compiler on a CPU "
                                      "(default: in runs of 1,000 steps or more, where it works)")
    fsdp: bool = flag(False, "under torchrun: spread weights and optimizer over the processes, for "
                             "models that do not fit into one (default: every process has all)")
    # reports
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    valid_every: int = flag(250, "steps between validations")
    valid_rows: int = flag(512, "validation rows, evenly spread over the split")
    save_every: int = flag(250, "steps between writes of last.pt")
    num_samples: int = flag(2, "stories shown at every validation")
    sample_steps: int = flag(64, "their unmasking steps")
    sample_temperature: float = flag(0.8, "their temperature")
    sample_order: str = flag("random", "their order", ORDERS)
    wandb: bool = flag(False, "log to Weights & Biases too; offline where there is no network")

    def check(self) -> None:
        require(self.model_config in MODEL_CONFIGS, f"--model_config {self.model_config}: unknown "
                f"size, choose from {', '.join(MODEL_CONFIGS)}")
        for name in ("max_steps", "batch_tokens", "grad_accum_steps", "log_every", "valid_every",
                     "valid_rows", "save_every"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "grad_clip", "num_samples", "seed", "min_lr_ratio",
                     "neighbour_init"):
            require(0 <= getattr(self, name) < 2**63,
                    f"--{name} {getattr(self, name)}: must be 0 or more")
        require(self.warmup_steps is None or self.warmup_steps >= 0,
                f"--warmup_steps {self.warmup_steps}: must be 0 or more")
        require(self.encoder_config in (None, *MODEL_CONFIGS), f"--encoder_config "
                f"{self.encoder_config}: unknown size, choose from {', '.join(MODEL_CONFIGS)}")
        first, last = self.between
        require(0 <= first < last <= 1, f"--t_min {first:g} --t_max {last:g}: must be from 0 to 1, "
                "the first the smaller one (give both)")
        require(self.encoder_config is None or self.image_encoder is None, "--encoder_config and "
                "--image_encoder: give one of them")
        kind_of_run(self)  # refuses what no kind of model trains
        require(self.stage == 1 or self.decoder_checkpoint or self.resume, f"--stage "
                f"{self.stage} starts from a trained model: name it with --decoder_checkpoint")
        require(0 <= self.self_conditioning <= 1, f"--self_conditioning {self.self_conditioning}: "
                "must be from 0 to 1")
        for name in ("dropout", "ema_decay", "condition_dropout", "causal_share"):
            require(0 <= getattr(self, name) < 1,
                    f"--{name} {getattr(self, name)}: must be at least 0 and less than 1")
        try:
            self.sampler().check()
        except UserError as error:  # whose flags have other names here
            raise UserError(str(error).replace("--", "--sample_", 1)) from error
        require(0 <= self.lora_rank <= 1024 and set(self.lora_targets) <= set(LORA_TARGETS)
                and self.lora_targets, f"--lora_rank {self.lora_rank} --lora_targets "
                f"{' '.join(self.lora_targets)}: a rank of 0 to 1024, and some of "
                f"{', '.join(LORA_TARGETS)}")
        require(self.lora_alpha is None or 0 < self.lora_alpha < math.inf,
                f"--lora_alpha {self.lora_alpha}: must be positive")
        require(self.lr is None or 0 < self.lr < math.inf, f"--lr {self.lr}: must be positive")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")

    def check_used(self, given: set[str]) -> None:
        """Refuses flags that were given and would change nothing."""
        for name, stages in (("decoder_checkpoint", (2, 3)), ("encoder_config", (2,)),
                             ("image_encoder", (2,)),
                             ("condition_dropout", (2, 3) if self.lora_rank else (3,)),
                             ("lora_rank", (2,)), ("init_from", (1,))):
            require(name not in given or self.stage in stages, f"--{name} belongs to --stage "
                    f"{' or '.join(map(str, stages))}: leave it out of stage {self.stage}")
        require(self.lora_rank or not given & {"lora_alpha", "lora_targets"}, "--lora_alpha and "
                "--lora_targets belong to --lora_rank: give it a rank")
        kind = kind_of_run(self)
        for other in trained_kinds():
            strange = sorted(given & (other.own - kind.own))
            require(not strange, f"--{' --'.join(strange)}: for --objective "
                    f"{' or '.join(other.objectives)} alone; leave it out")
        unused = sorted(given & kind.unused)
        require(not unused, f"--{' --'.join(unused)}: {kind.unused_for}; leave it out")
        unused = sorted(given & set(NETWORK_SETTINGS)) if self.stage > 1 else []
        require(not unused, f"--{' --'.join(unused)}: stage {self.stage} goes on with the model of "
                            f"{self.decoder_checkpoint}; leave it out")

    @property
    def between(self) -> tuple[float, float]:
        """The times at which whole rows are trained."""
        chosen_for = (self.objective != "elbo" and self.schedule == "linear"
                      and self.time_conditioning == "none")
        first, last = TIMES if chosen_for else (0.0, 1.0)
        return (first if self.t_min is None else self.t_min,
                last if self.t_max is None else self.t_max)

    @property
    def drops_conditions(self) -> float:
        """The share of the rows that are trained without their condition."""
        changes = self.stage == 3 or self.stage == 2 and self.lora_rank
        return self.condition_dropout if changes else 0.0

    @property
    def peak_lr(self) -> float:
        return self.lr or DEFAULT_LR[self.optimizer] * STAGE_LR[self.stage]

    def sampler(self) -> Sampler:
        return Sampler(steps=self.sample_steps, temperature=self.sample_temperature,
                       order=self.sample_order)


def refuse_changes(stored: dict, changed: dict, folder: str) -> None:
    """Refuses new values of settings with which the run in `folder` cannot go on (UserError).

    `stored` are the settings that it was started with, `changed` those asked for now, by their
    names.
    """
    stored = dataclasses.asdict(TrainConfig()) | stored  # an older run lacks the newest ones
    for name, value in changed.items():
        other_kind = name == "objective" and not any(
            {value, stored[name]} <= {*kind.objectives} for kind in KINDS.values())
        require(name not in FIXED and not other_kind or value == stored[name], f"--{name} {value}: "
                f"the run in {folder} was started with {stored[name]}, which cannot change; choose "
                "another --checkpoint_dir")


QUICK = dict(data_dir="quick_run/data", data_source=["sample"], checkpoint_dir="quick_run",
             model_config="micro", max_steps=600, batch_tokens=3072, lr=0.02, valid_every=300,
             t_min=0.0, t_max=1.0,  # its stories follow patterns, of which the ends teach much
             valid_rows=128, num_samples=3, sample_steps=256, sample_temperature=0.3,
             sample_order="confidence")
QUICK_DATA = dict(vocab_size=2048, seq_len=128)
