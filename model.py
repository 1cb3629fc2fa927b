"""The networks and their size table, built from network/. A library: nothing to run here.

    model = create_model("small", vocab_size=8192)   # DiffusionTransformer
    hidden = model.hidden(tokens)                    # (B, L, D)
    logits = model.head(hidden[masked])              # (M, V): only the positions that need it
    logits = model(tokens)                           # (B, L, V)

Notable features of the DiffusionTransformer
- bidirectional: no mask at all, also not for padding ([PAD] is visible and learned); with
  `causal=True` the same network is an autoregressive model, for comparisons of equal size
- pre-norm with RMSNorm without gains (arXiv 1910.07467), rotary positions (arXiv 2104.09864)
- queries and keys normalised (QK-norm, arXiv 2010.04245), MLP with SwiGLU (arXiv 2002.05202)
- values that are mixed with those of the first block (arXiv 2410.17897), and a gate on every head
- heads that look at neighbours from the first step on: queries and keys have a bias, set so that
  under rotary positions head 1 attends to the token before, head 2 to the one after, and so on. It
  costs nothing, any attention kernel works with it, and training may unlearn it (`neighbour_init`)
- zero-initialised output projections: a new block is the identity
- one matrix for embedding and vocabulary head (`tied_head`); the ids that can never be predicted
  have probability 0 (SUBS, arXiv 2406.07524 section 3.2)
- with a condition (`create_conditional_model`): a bidirectional TextEncoder reads it, and every
  block attends to what it gives. Until trained that changes nothing, to the bit
- with self-conditioning (arXiv 2208.04202) the next pass is told what an earlier one expects at a
  hidden place: the mean of the likeliest tokens' embeddings, through a matrix that begins at zero
- no time input by default: the number of [MASK] already tells it (arXiv 2406.03736);
  `time_conditioning="sinusoidal"` adds one
- FP32 weights, computed in `precision`: "fp32", "bf16" or "fp16" (see `set_precision`)
"""

from cli import require

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import EOS, MASK
from network.attention import Context, CrossAttention, View, rope_frequencies
from network.draft_head import DraftHead
from network.encoders import ConditionEncoder, TextEncoder, reading_bias
from network.head_loss import Taught, chunks, head_loss, head_scores
from network.layers import CARRIED, Linear, ModelConfig, likeliest, rms_norm
from network.lora import PART as ADAPTER
from network.lora import add_adapters
from network.transformer import Block, Known, Transformer

# The special tokens that can be predicted
Ends = tuple[int, ...] | None

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
        self.carry = None
        if config.self_conditioning:
            self.carry = Linear(config.width, config.width, std=0.0)
        self.draft = None
        if config.draft_rank:
            self.draft = DraftHead(self.embedding, self.vocabulary, config.draft_rank)
        add_adapters(list(self.blocks), config)
        # In the twin the end of the story has to be predicted; in diffusion it is always visible.
        impossible = torch.zeros(config.vocab_size)
        impossible[:EOS if config.causal else EOS + 1] = -math.inf
        self.register_buffer("impossible", impossible, persistent=False)  # added to the logits

    @property
    def kind(self) -> str:
        return "autoregressive" if self.config.causal else "diffusion"

    @property
    def picks(self) -> bool:
        """Whether `hidden` can be asked for some tokens alone, which its last block makes use of.
        """
        return not self.config.causal

    @property
    def self_conditioning(self) -> float:
        """The share of the rows that are trained to read what an earlier pass made of them."""
        return self.config.self_conditioning

    def hidden(self, tokens: Tensor, t: Tensor | None = None, context: Context | None = None,
               at: Tensor | None = None, view: View | None = None, known: Known | None = None,
               kept: Known | None = None, carried: Tensor | None = None) -> Tensor:
        """Final hidden states.

        Args:
            tokens: (B, L) token ids, L at most `max_len`; hidden ones are [MASK].
            t: (B,) diffusion times in (0, 1]; needed only with time conditioning.
            context: what `encode` of a conditional model gives; None is no condition.
            at: numbers of the tokens whose states are wanted, (B, C) in each row, or (M,) in all
                B * L (without a context or a cache); None is all.
            view: where the tokens stand and what they look at, made by `view`; None: at 0 to L - 1
                of their rows, and everything (of a causal model what stands before each).
            known: keys and values of other tokens, which these see too: what another pass `kept`.
            kept: a list for those of these tokens, one pair a block.
            carried: (B, L, 2 CARRIED) what `expected` made of an earlier pass over the row, for a
                model with self-conditioning. It is read at hidden places alone; None and zeros are
                nothing.
        Returns: (B, L, D), or (B, C, D) or (M, D), normalised, in the compute precision.
        """
        if context is not None and self.blocks[0].cross is None:
            raise ValueError("this model has no cross-attention: it takes no context")
        view = self.view(tokens.shape[1]) if view is None else view
        if at is not None and view.causal:
            raise ValueError("a causal pass gives all positions")
        x = self.embed(tokens)  # (B, L, D)
        if self.time is not None:
            if t is None:
                raise ValueError("this model is conditioned on time: pass t")
            x = x + self.time(self._time_features(t).to(x.dtype))[:, None]  # (B, 1, D)
        added = None
        if carried is not None:
            added = self.carry(self.mean_embedding(carried).to(x.dtype))
            added = added * (tokens == MASK)[..., None].to(x.dtype)
        return self.through_blocks(x, view._replace(at=at), context, known=known, kept=kept,
                                   added=added)

    def mean_embedding(self, carried: Tensor) -> Tensor:
        """(B, L, 2 CARRIED) -> (B, L, D), sum_k p_k norm(e_k): the tokens' normalised embeddings,
        weighed by their probabilities, which need not sum to 1. No gradient goes into them here."""
        ids, weights = carried[..., :CARRIED].long(), carried[..., CARRIED:]
        table = self.embedding.weight.detach().to(self.compute_dtype)
        if torch.compiler.is_exporting() or ids.numel() < len(table):
            return (rms_norm(table[ids]) * weights.to(table.dtype)[..., None]).sum(-2)
        # twenty times as fast as writing out all that is summed
        return F.embedding_bag(ids.flatten(0, -2), rms_norm(table).float(), mode="sum",
                               per_sample_weights=weights.flatten(0, -2)).view(
            *ids.shape[:-1], -1)

    @torch.no_grad()
    def expected(self, hidden: Tensor, ends: Ends = None) -> Tensor:
        """(M, D) hidden states -> (M, 2 CARRIED) FP32: the ids of the likeliest tokens and their
        probabilities."""
        return torch.cat([likeliest(self.head(hidden[part], ends)) for part in chunks(hidden)])

    def head(self, hidden: Tensor, ends: Ends = None) -> Tensor:
        """(..., D) hidden states -> (..., V) logits; ids that can never be predicted get -inf.

        Text can be, and of the special tokens those of `ends`: None are what the model is made for,
        [EOS] in the causal twin and none where the end is always visible.
        """
        return F.linear(hidden, self.vocabulary.weight.to(hidden.dtype),
                        self.head_bias(hidden, ends))

    def loss(self, hidden: Tensor, targets: Tensor | Taught, row_weights: Tensor,
             ends: Ends = None) -> Tensor:
        """Weighted sum of -log p of the targets (M,) behind hidden states (M, D), or of the
        cross-entropies with what a teacher says there: a scalar."""
        return head_loss(hidden, self.vocabulary.weight, self.head_bias(hidden, ends), targets,
                         row_weights)

    def scores(self, hidden: Tensor, targets: Tensor, ends: Ends = None) -> tuple[Tensor, Tensor]:
        """-log p of the targets (M,), and whether each was the likeliest token; no gradient."""
        return head_scores(hidden, self.vocabulary.weight, self.head_bias(hidden, ends), targets)

    def head_bias(self, hidden: Tensor, ends: Ends) -> Tensor:
        """(V,) in the precision of `hidden`: 0 for what can be predicted, -inf (FP16: -1e4)."""
        bias = (self.impossible if ends is None else
                impossible_but(ends, len(self.impossible), self.impossible.device))
        if hidden.dtype == torch.float16:  # an infinity there soon becomes NaN; e^-1e4 is 0 too
            bias = bias.clamp(min=-1e4)
        return bias.to(hidden.dtype)

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


@functools.lru_cache(maxsize=16)
def impossible_but(ends: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """(V,): 0 for text and these special tokens, -inf for the others."""
    bias = torch.zeros(size)
    bias[[i for i in range(EOS + 1) if i not in ends]] = -math.inf
    return bias.to(device)


class ConditionalTransformer(DiffusionTransformer):
    """A denoiser that attends to a condition, and the encoder that reads it.

    With no context it is the denoiser alone, to the bit.
    """

    kind = "conditional"

    def __init__(self, config: ModelConfig, encoder: ConditionEncoder):
        require(not config.causal, "the causal twin takes no condition")
        encoder.check_decoder(config)
        super().__init__(config)
        for block in self.blocks:
            block.cross = CrossAttention(config, encoder.width, encoder.placed)
        self.encoder = encoder

    @property
    def all_blocks(self) -> list[Block]:
        return [*self.blocks, *self.encoder.all_blocks]

    def encode(self, condition: Tensor) -> Context:
        """A batch of conditions, as the encoder takes them -> what `hidden` takes as its context.

        Every block reads the encoder at its own depth, as it reads its own row.
        """
        states, positions, given = self.encoder(condition)
        none = ~given.any(1)  # (B,)
        depth = (len(states) - 1) / max(1, len(self.blocks) - 1)
        where: tuple[Tensor | None, Tensor | None] = None, None
        if self.encoder.placed:
            frequencies = rope_frequencies(self.config).to(positions.device)
            angles = positions[:, None, :, None].float() * frequencies  # (B, 1, S, D/H/2)
            where = angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)
        keys, values = map(torch.stack, zip(*(
            block.cross.keys_values(states[round(i * depth)], *where)
            for i, block in enumerate(self.blocks)), strict=True))
        return Context(keys, values.masked_fill(none[:, None, None, None], 0.0),
                       reading_bias(given, self.compute_dtype))

    def load_decoder(self, weights: dict[str, Tensor]) -> None:
        """Takes over the weights of a model without a condition."""
        missing, unexpected = self.load_state_dict(weights, strict=False)
        if unexpected or not all(map(is_of_condition, missing)):
            raise RuntimeError("these are not the weights of this denoiser")

    def start_encoder(self) -> None:
        """Gives the encoder what the denoiser has learned already and, where that makes them alike,
        the cross-attention the matrices of the self-attention beside it, so that the condition is
        first read nearly as if it stood before the text (the first block's values and the gates of
        heads are the self-attention's alone).
        """
        if self.encoder.start_from(self):
            for block in self.blocks:
                own, other = block.cross.state_dict(), block.attention.state_dict()
                block.cross.load_state_dict(own | {
                    name: other[name] for name in own.keys() & other.keys()})

    def freeze_decoder(self) -> None:
        """Leaves only the encoder, the cross-attention and adapters to be trained."""
        self.train_only(is_of_condition)

    def unfreeze(self) -> None:
        self.train_only(lambda name: True)


def is_of_condition(name: str) -> bool:
    """Whether a parameter of that name belongs to the encoder, the cross-attention or an adapter:
    what is trained while the denoiser stays as it is."""
    return name.startswith("encoder.") or ".cross." in name or ADAPTER in name


def create_conditional_model(encoder_config: str = "small", decoder_config: str = "small",
                             vocab_size: int = 8192, condition_len: int = 64, **overrides: Any,
                             ) -> ConditionalTransformer:
    """A new model whose denoiser and encoder have sizes of MODEL_CONFIGS.

    `condition_len` is the longest condition in tokens, [BOS] and [EOS] included; `overrides` are
    fields of the denoiser's ModelConfig.
    """
    encoder = TextEncoder(size_of(encoder_config, vocab_size=vocab_size, max_len=condition_len))
    return ConditionalTransformer(size_of(decoder_config, vocab_size=vocab_size, **overrides),
                                  encoder)
