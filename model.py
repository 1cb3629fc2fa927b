"""The networks, their size table, and the checkpoint format. A library: nothing to run here.

    model = create_model("small", vocab_size=8192)   # DiffusionTransformer
    hidden = model.hidden(tokens)                    # (B, L, D)
    logits = model.head(hidden[masked])              # (M, V): only the positions that need it
    logits = model(tokens)                           # (B, L, V)

Notable features of the DiffusionTransformer
- bidirectional: no mask at all, also not for padding ([PAD] is visible and learned); with
  `causal=True` the same network is an autoregressive model, for comparisons of equal size
- pre-norm with RMSNorm without gains (arXiv 1910.07467), rotary positions (arXiv 2104.09864)
- queries and keys normalised (QK-norm, arXiv 2010.04245), MLP with squared ReLU (arXiv 2109.08668)
- heads that look at neighbours from the first step on: queries and keys have a bias, set so that
  under rotary positions head 1 attends to the token before, head 2 to the one after, and so on. It
  costs nothing, any attention kernel works with it, and training may unlearn it (`neighbour_init`)
- zero-initialised output projections: a new block is the identity
- one matrix for embedding and vocabulary head (`tied_head`); the ids that can never be predicted
  have probability 0 (SUBS, arXiv 2406.07524 section 3.2)
- with a condition (`create_conditional_model`): a bidirectional TextEncoder reads it, and every
  block attends to what it gives. Until trained that changes nothing, to the bit
- no time input by default: the number of [MASK] already tells it (arXiv 2406.03736);
  `time_conditioning="sinusoidal"` adds one
- FP32 weights, computed in `precision`: "fp32", "bf16" or "fp16" (see `set_precision`)
"""

from cli import UserError, atomic_file, require

import dataclasses
import functools
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep import EOS, PAD, TokenRows, is_length_histogram, load_tokenizer, sha256
from head_loss import head_loss, head_scores
from layers import Block, CrossAttention, Linear, ModelConfig, rms_norm, rope_frequencies

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "diffusion-llm checkpoint", 2
CHECKPOINT_KEYS = ("kind", "model_config", "weights", "tokenizer", "tokenizer_sha256",
                   "length_histogram")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MODEL_CONFIGS = {
    "micro": ModelConfig(width=128, heads=2, layers=4),  # for tables of many short runs
    "tiny": ModelConfig(width=256, heads=4, layers=4),
    "small": ModelConfig(width=384, heads=6, layers=6),
    "medium": ModelConfig(width=512, heads=8, layers=8),
    "large": ModelConfig(width=640, heads=10, layers=10),
    "xlarge": ModelConfig(width=768, heads=12, layers=12),
    "xxlarge": ModelConfig(width=1024, heads=16, layers=16),
}


def create_model(name: str, vocab_size: int = 8192, **overrides: Any) -> "DiffusionTransformer":
    """A new model of a size of MODEL_CONFIGS; `overrides` are fields of ModelConfig."""
    return DiffusionTransformer(size_of(name, vocab_size=vocab_size, **overrides))


def size_of(name: str, **overrides: Any) -> ModelConfig:
    """That size of MODEL_CONFIGS with some of its fields replaced."""
    require(name in MODEL_CONFIGS, f"unknown size {name!r}: choose from {', '.join(MODEL_CONFIGS)}")
    return dataclasses.replace(MODEL_CONFIGS[name], **overrides)


class Context(NamedTuple):
    """What the cross-attention of every block needs of a condition; computed once for a story."""

    keys: Tensor  # (layers, B, H, S, D/H)
    values: Tensor  # (layers, B, H, S, D/H); zeros in a row without a condition
    bias: Tensor  # (B, 1, 1, S): 0, or HIDDEN where the condition is padded


HIDDEN = -1e4  # a score that gets no weight in any precision, and is finite, as graphs need it


class Transformer(nn.Module):
    """Embedding and blocks: what the denoiser and the encoder of its condition have in common."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        angles = torch.arange(config.max_len).float()[:, None] * rope_frequencies(config)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_len, D/H/2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.compute_dtype = torch.float32

    @property
    def all_blocks(self) -> list[Block]:
        return list(self.blocks)

    def set_precision(self, precision: str) -> "Transformer":
        """Sets what activations are computed in ("fp32", "bf16", "fp16"); weights stay FP32."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.compute_dtype = PRECISIONS[precision]
        return self

    def for_inference(self) -> "Transformer":
        """Keeps the weights in the compute precision, so that no call has to cast them; what is
        computed stays the same to the bit."""
        return self.requires_grad_(False).eval().to(self.compute_dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D) in the compute precision."""
        if tokens.shape[1] > self.config.max_len:
            raise ValueError(f"rows of {tokens.shape[1]} tokens, but max_len is "
                             f"{self.config.max_len}")
        return self.embedding(tokens).to(self.compute_dtype)

    def through_blocks(self, x: Tensor, bias: Tensor | None = None,
                       context: Context | None = None, states: list[Tensor] | None = None,
                       at: Tensor | None = None) -> Tensor:
        """(B, L, D) embedded tokens -> (B, L, D) final hidden states, normalised; with `at` (B, C)
        those of these positions, (B, C, D).

        What each block reads, (B, L, D), is appended to `states`.
        """
        x = rms_norm(x)
        cos, sin = (table[:x.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        seeds = [None] * len(self.blocks)
        if self.config.dropout and self.training:
            seeds = torch.randint(2**62, (len(seeds), 2))  # on the CPU, from its global generator
        for i, (block, own) in enumerate(zip(self.blocks, seeds, strict=True)):
            if states is not None:
                states.append(rms_norm(x))
            told = None if context is None else (context.keys[i], context.values[i], context.bias)
            # The other positions of the last block would be worked out for nobody.
            x = block(x, cos, sin, own, bias, told, at if block is self.blocks[-1] else None)
        return rms_norm(x)


class DiffusionTransformer(Transformer):
    """Predicts the tokens behind [MASK] from everything visible, to the left and to the right."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        # Nearly zero logits at first: the loss starts at log V whatever the width is.
        self.vocabulary = Linear(config.width, config.vocab_size, std=0.02 * config.width ** -0.5)
        if config.tied_head:
            self.vocabulary.weight = self.embedding.weight
        self.time = None
        if config.time_conditioning == "sinusoidal":
            self.time = nn.Sequential(Linear(config.width, config.width), nn.SiLU(),
                                      Linear(config.width, config.width, std=0.0))
        # In the twin the end of the story has to be predicted; in diffusion it is always visible.
        never = torch.zeros(config.vocab_size)
        never[:EOS if config.causal else EOS + 1] = -math.inf
        self.register_buffer("never", never, persistent=False)  # added to the logits

    @property
    def kind(self) -> str:
        return "autoregressive" if self.config.causal else "diffusion"

    def hidden(self, tokens: Tensor, t: Tensor | None = None, context: Context | None = None,
               bias: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Final hidden states.

        Args:
            tokens: (B, L) token ids, L at most `max_len`; hidden ones are [MASK].
            t: (B,) diffusion times in (0, 1]; needed only with time conditioning.
            context: what `encode` of a conditional model gives; None is no condition.
            bias: (B, 1, 1, L), added to the attention scores: hides positions in a graph whose
                rows are longer than the story's.
            at: (B, C) the positions that are wanted, without dropout; None is all.
        Returns: (B, L, D) or (B, C, D), normalised, in the compute precision.
        """
        if context is not None and self.kind != "conditional":
            raise ValueError("this model has no cross-attention: it takes no context")
        if at is not None and self.config.causal:
            raise ValueError("a causal model gives all positions")
        x = self.embed(tokens)  # (B, L, D)
        if self.time is not None:
            if t is None:
                raise ValueError("this model is conditioned on time: pass t")
            x = x + self.time(self._time_features(t).to(x.dtype))[:, None]  # (B, 1, D)
        return self.through_blocks(x, bias, context, at=at)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) logits; ids that can never be predicted get -inf."""
        return F.linear(hidden, self.vocabulary.weight.to(hidden.dtype), self._head_bias(hidden))

    def loss(self, hidden: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
        """Weighted sum of -log p of the targets (M,) behind hidden states (M, D): a scalar."""
        return head_loss(hidden, self.vocabulary.weight, self._head_bias(hidden), targets,
                         row_weights)

    def scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of the targets (M,), and whether each was the likeliest token; no gradient."""
        return head_scores(hidden, self.vocabulary.weight, self._head_bias(hidden), targets)

    def _head_bias(self, hidden: Tensor) -> Tensor:
        never = self.never
        if hidden.dtype == torch.float16:  # an infinity there soon becomes NaN; e^-1e4 is 0 too
            never = never.clamp(min=-1e4)
        return never.to(hidden.dtype)

    def forward(self, tokens: Tensor, t: Tensor | None = None, context: Context | None = None,
                ) -> Tensor:
        """(B, L) token ids -> (B, L, V) logits."""
        return self.head(self.hidden(tokens, t, context))

    def _time_features(self, t: Tensor) -> Tensor:
        half = self.config.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / half))
        angles = 1000 * t[:, None] * frequencies  # (B, D/2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def count_parameters(self) -> tuple[int, int]:
        """(all parameters, those without the embedding and the vocabulary head)."""
        total = sum(p.numel() for p in self.parameters())
        vocabulary = {id(module.weight): module.weight.numel() for name, module in
                      self.named_modules() if name.endswith(("embedding", "vocabulary"))}
        return total, total - sum(vocabulary.values())


# ---- with a condition ----------------------------------------------------------------------------

class TextEncoder(Transformer):
    """Reads a condition, in both directions."""

    def forward(self, tokens: Tensor, bias: Tensor) -> list[Tensor]:
        """(B, S) token ids, [PAD] behind the text, and (B, 1, 1, S) for the attention scores ->
        (B, S, E) for each depth: what every block reads, and what the last one leaves."""
        states: list[Tensor] = []
        last = self.through_blocks(self.embed(tokens), bias, states=states)
        return [*states, last]


class ConditionalTransformer(DiffusionTransformer):
    """A denoiser that attends to a condition, and the encoder that reads it.

    With no context it is the denoiser alone, to the bit.
    """

    kind = "conditional"

    def __init__(self, config: ModelConfig, encoder_config: ModelConfig):
        require(not config.causal, "the causal twin takes no condition")
        require(config.vocab_size == encoder_config.vocab_size, "encoder and denoiser must have "
                "the same vocabulary")
        super().__init__(config)
        for block in self.blocks:
            block.cross = CrossAttention(config, encoder_config.width)
        self.encoder = TextEncoder(encoder_config)

    @property
    def all_blocks(self) -> list[Block]:
        return [*self.blocks, *self.encoder.blocks]

    def encode(self, condition: Tensor) -> Context:
        """(B, S) token ids, [PAD] behind them -> what `hidden` takes as its context.

        S is at most the encoder's `max_len`. A row of [PAD] alone has no condition.
        """
        given = condition != PAD  # (B, S)
        none = ~given.any(1)  # (B,)
        bias = torch.zeros(condition.shape, dtype=self.compute_dtype, device=condition.device)
        bias = bias.masked_fill(~given & ~none[:, None], HIDDEN)[:, None, None]  # (B, 1, 1, S)
        # Every block reads the encoder at its own depth, as it reads its own row.
        states = self.encoder(condition, bias)  # of (B, S, E)
        depth = (len(states) - 1) / max(1, len(self.blocks) - 1)
        # The text begins at position 1: the condition's last token, before its [EOS], is at 0.
        position = torch.arange(condition.shape[1], device=condition.device)
        position = position - (given.sum(1, keepdim=True) - 2)  # (B, S)
        frequencies = rope_frequencies(self.config).to(condition.device)
        angles = position[:, None, :, None].float() * frequencies  # (B, 1, S, D/H/2)
        where = angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)
        keys, values = map(torch.stack, zip(*(
            block.cross.keys_values(states[round(i * depth)], *where)
            for i, block in enumerate(self.blocks)), strict=True))
        return Context(keys, values.masked_fill(none[:, None, None, None], 0.0), bias)

    def load_decoder(self, weights: dict[str, Tensor]) -> None:
        """Takes over the weights of a model without a condition."""
        missing, unexpected = self.load_state_dict(weights, strict=False)
        if unexpected or not all(map(is_of_condition, missing)):
            raise RuntimeError("these are not the weights of this denoiser")

    def start_encoder(self) -> None:
        """Gives the encoder the denoiser's first blocks, which have learned to read already, and
        the cross-attention the weights of the self-attention beside it, so that the condition is
        first read as if it stood before the text. Both must have the same width.
        """
        learned = self.state_dict()
        self.encoder.load_state_dict({name: learned[name] for name in self.encoder.state_dict()})
        for block in self.blocks:
            block.cross.load_state_dict(block.cross.state_dict() | block.attention.state_dict())

    def freeze_decoder(self) -> None:
        """Leaves only the encoder and the cross-attention to be trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_of_condition(name))

    def unfreeze(self) -> None:
        self.requires_grad_(True)


def is_of_condition(name: str) -> bool:
    """Whether a parameter of that name belongs to the encoder or the cross-attention."""
    return name.startswith("encoder.") or ".cross." in name


def create_conditional_model(encoder_config: str = "small", decoder_config: str = "small",
                             vocab_size: int = 8192, condition_len: int = 64, **overrides: Any,
                             ) -> ConditionalTransformer:
    """A new model whose denoiser and encoder have sizes of MODEL_CONFIGS.

    `condition_len` is the longest condition in tokens, [BOS] and [EOS] included; `overrides` are
    fields of the denoiser's ModelConfig.
    """
    return ConditionalTransformer(size_of(decoder_config, vocab_size=vocab_size, **overrides),
                                  size_of(encoder_config, vocab_size=vocab_size,
                                          max_len=condition_len))


# ---- where to run --------------------------------------------------------------------------------

def device_of(model: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lives; the CPU if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, or the best one here: CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            require(device.type in ("cpu", "cuda", "mps"), f"--device {name}: use auto, cpu, cuda "
                                                           "or mps")
            torch.empty(0, device=device)
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"--device {name} cannot be used here; try auto or cpu") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(device: torch.device, name: str = "auto", before: str | None = None) -> str:
    """`name`, or for "auto" the fastest safe precision of the device's matrix units.

    A CPU that claims to multiply in bf16 may still be faster in FP32: both are timed, once in a
    process. `before` is what a resumed run was computed in: kept where the timing would decide,
    which may come out otherwise the second time.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if not claims_bf16(device):
        return "fp32"
    if before is not None:
        return before
    seconds = block_seconds()
    return min(seconds, key=seconds.__getitem__)


def precision_reason(device: torch.device, name: str = "auto", before: str | None = None) -> str:
    """Why pick_precision chooses what it does with these arguments, where a timing decided."""
    if name != "auto" or before is not None or not claims_bf16(device):
        return ""
    seconds = block_seconds()
    return (f"a block takes {1e3 * seconds['bf16']:.0f} ms in bf16, "
            f"{1e3 * seconds['fp32']:.0f} ms in FP32")


def claims_bf16(device: torch.device) -> bool:
    """Whether it is a CPU whose flags say that it has instructions for products in bf16."""
    if device.type != "cpu":
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


@functools.cache
def block_seconds(enough: float = 0.4) -> dict[str, float]:
    """Seconds that this CPU needs for a block of the small size, forward and backward, on 4 x 256
    tokens, in FP32 and in bf16: products, attention, norms and conversions in their true shares.

    The best of two to five rounds, in which both have their turn, so that what else the machine
    does disturbs both alike; no third one begins after `enough` seconds. The random state is left
    as it was.
    """
    config, best = MODEL_CONFIGS["small"], dict.fromkeys(("fp32", "bf16"), math.inf)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        block = Block(config)
        angles = torch.arange(config.max_len).float()[:, None] * rope_frequencies(config)
        tokens = torch.randn(4, config.max_len, config.width)
        deadline = time.perf_counter() + enough
        for done in range(5):
            if done >= 2 and time.perf_counter() > deadline:
                break
            for precision in best:
                x, cos, sin = (table.to(PRECISIONS[precision]) for table in
                               (tokens, angles.cos(), angles.sin()))
                started = time.perf_counter()
                block(x.requires_grad_(), cos, sin).sum().backward()
                best[precision] = min(best[precision], time.perf_counter() - started)
    return best


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path: str | Path, model: DiffusionTransformer, tokenizer: str,
                    length_histogram: dict, **state: Any) -> None:
    """Writes a `.pt` checkpoint, whole or not at all.

    It carries the tokenizer (text of tokenizer.json) and the length histogram, so that generation
    needs this one file. `state` is whatever the writer needs to continue (`ema`, `optimizer`,
    `step`, `cursor`, ...): plain containers, numbers, strings and tensors only; `weights` in it
    replaces the model's state dict where that one is spread over several processes.
    """
    contents = {
        "format": CHECKPOINT_FORMAT, "format_version": CHECKPOINT_VERSION,
        "kind": model.kind, "model_config": dataclasses.asdict(model.config),
        "encoder_config": (dataclasses.asdict(model.encoder.config)
                           if model.kind == "conditional" else None), "tokenizer": tokenizer,
        "tokenizer_sha256": sha256(tokenizer.encode()), "length_histogram": length_histogram,
        **({} if "weights" in state else {"weights": model.state_dict()}), **state}
    with atomic_file(path) as file:
        torch.save(contents, file)


def load_checkpoint(path: str | Path, kind: str | tuple[str, ...] | None = "diffusion") -> dict:
    """Reads a checkpoint without running code from it (`weights_only`).

    Raises UserError if the file is missing, damaged, foreign, of another format version, or not of
    this `kind` ("diffusion", "conditional", "autoregressive" or several; None takes all).
    """
    path = Path(path)
    require(not path.is_dir(), f"{path} is a folder; name a .pt file in it")
    require(path.is_file(), f"no checkpoint {path}: train one first, `python train.py`")
    contents, cause = None, None
    if zipfile.is_zipfile(path):  # as torch.save writes; anything else is refused unopened
        try:
            with zipfile.ZipFile(path) as archive:
                # torch looks at no checksum, and would unpack what is larger than the file.
                if archive.testzip() is None and not any(
                        entry.compress_type for entry in archive.infolist()):
                    contents = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise nearly anything
            cause = error
    if contents is None:
        raise UserError(f"{path} is not a checkpoint of this program, or is damaged; name a .pt "
                        "file that train.py wrote") from cause
    require(isinstance(contents, dict) and contents.get("format") == CHECKPOINT_FORMAT,
            f"{path} is a torch file but not a checkpoint of this program; name a .pt file that "
            "train.py wrote")
    version = contents.get("format_version")
    require(version == CHECKPOINT_VERSION, f"{path} has checkpoint format version {version}, this "
            f"program reads version {CHECKPOINT_VERSION}: use the program that wrote it")
    missing = [key for key in CHECKPOINT_KEYS if key not in contents]
    require(not missing, f"{path} lacks {', '.join(missing)}: it was not written by train.py")
    kinds = (kind,) if isinstance(kind, str) else kind
    require(kinds is None or contents["kind"] in kinds, f"{path}: {contents['kind']} model; "
            f"what is needed here is of the kind: {' or '.join(kinds or ())} model")
    wrong = wrong_entries(contents)
    require(not wrong, f"{path} was changed after train.py wrote it ({', '.join(wrong)}): name "
                       "another .pt file")
    return contents


def wrong_entries(contents: dict) -> list[str]:
    """The names of a checkpoint's entries that are not of the form that is written here."""
    text, average = contents["tokenizer"], contents.get("ema")
    right = {
        "kind": contents["kind"] in ("diffusion", "conditional", "autoregressive"),
        "model_config": isinstance(contents["model_config"], dict),
        "tokenizer": isinstance(text, str) and
        sha256(text.encode(errors="replace")) == contents["tokenizer_sha256"],
        "length_histogram": is_length_histogram(contents["length_histogram"]),
        "train_config": isinstance(contents.get("train_config", {}), dict),
        "weights": are_tensors(contents["weights"]),
        "ema": average is None or are_tensors(average)}
    return [key for key, fine in right.items() if not fine]


def are_tensors(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items())


def find_checkpoint(name: str | None, kind: str | tuple[str, ...] | None = None) -> Path:
    """The checkpoint of that name, or the newest best.pt of this `kind` (as in load_checkpoint) in
    a folder beside the scripts' output; newer ones that had to be passed over are named on stderr.
    """
    if name is not None:
        return Path(name)
    found = sorted(Path().glob("*/best.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    require(found, "no */best.pt here: train a model first (`python train.py --quick`) or name "
                   "one with --checkpoint")
    passed = []
    for path in found:
        if kind is None:
            return path
        has = kind_of(path)
        if has is not None and has in ((kind,) if isinstance(kind, str) else kind):
            if passed:
                print(f"using {path}; newer, but not what is needed here: {', '.join(passed)}",
                      file=sys.stderr)
            return path
        passed.append(f"{path} ({f'{has} model' if has else 'not to be read'})")
    raise UserError(f"no */best.pt here is of the kind that is needed: "
                    f"{kind if isinstance(kind, str) else ' or '.join(kind)} model; found "
                    f"{', '.join(passed)}: train one first or name one with --checkpoint")


def kind_of(path: Path) -> str | None:
    """The kind of model in a checkpoint, whose weights stay on the disk; None if it cannot be read.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        ours = isinstance(contents, dict) and (contents["format"], contents["format_version"]) == (
            CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
        return contents["kind"] if ours else None
    except Exception:  # a damaged pickle can raise nearly anything
        return None


def model_from_checkpoint(checkpoint: dict, use_ema: bool = True) -> DiffusionTransformer:
    """The network of a checkpoint, with its averaged (EMA) weights where there are any."""
    average = checkpoint.get("ema") if use_ema else None
    weights = checkpoint["weights"] if average is None else average
    try:
        config = ModelConfig(**checkpoint["model_config"])
        check_size(config, weights)
        if checkpoint["kind"] == "conditional":
            encoder = ModelConfig(**checkpoint["encoder_config"])
            check_size(encoder, weights, "encoder.")
            model = ConditionalTransformer(config, encoder)
        else:
            model = DiffusionTransformer(config)
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, KeyError, ArithmeticError) as error:
        raise UserError("the checkpoint's weights do not fit its model settings: it was changed "
                        "after train.py wrote it") from error
    return model.eval()


def check_size(config: ModelConfig, weights: dict[str, Tensor], part: str = "") -> None:
    """Raises TypeError or RuntimeError, before memory is taken, for settings that do not belong to
    the weights.
    """
    for field in dataclasses.fields(config):
        kind = type(getattr(config, field.name))
        if kind is not field.type and (kind, field.type) != (int, float):
            raise TypeError(f"{field.name} is not of {field.type}")
    blocks = {name.removeprefix(part).split(".")[1] for name in weights
              if name.startswith(f"{part}blocks.")}
    hidden = weights[f"{part}blocks.0.up.weight"].shape[0]
    if (len(blocks) != config.layers or hidden != config.mlp_ratio * config.width
            or weights[f"{part}embedding.weight"].shape != (config.vocab_size, config.width)
            or not 1 <= config.max_len <= 2**20):
        raise RuntimeError("the weights are of another size")


def tokenizer_from_checkpoint(checkpoint: dict):
    return load_tokenizer(checkpoint["tokenizer"])


def check_conditions(path: str | Path, encoder: ModelConfig, told: TokenRows) -> None:
    """Refuses conditions that are longer than what the encoder of a checkpoint reads."""
    longest = int(told.lengths.max())
    require(longest <= encoder.max_len, f"{told.data_dir} has conditions of up to {longest} "
            f"tokens, {path} reads at most {encoder.max_len}: prepare them with --condition_len "
            f"{encoder.max_len}")


def check_tokenizer(path: str | Path, checkpoint: dict, data_dir: str | Path, meta: dict) -> None:
    """Refuses to mix a checkpoint with data that another tokenizer made."""
    require(checkpoint["tokenizer_sha256"] == meta["tokenizer_sha256"],
            f"{path} was trained with another tokenizer than that of {data_dir}: name the data "
            "folder that it was trained on")
