"""Block diffusion: one network that writes left to right, in blocks, or a whole row at once.

    python train.py --objective joint --block_sizes 4,16,row

A library: nothing to run here. Two passes of the same weights share a training step:

1. causal, over the clean row behind a [PAD]: every token is predicted from those before it, and the
   keys and values of every layer are kept;
2. over the noisy row, cut into blocks: a token sees its own block in both directions, and of the
   clean row, through the keys and values of pass 1, the blocks before its own (arXiv 2503.09573,
   eq. 8, whose clean half is causal by blocks and predicts nothing). A block of the whole `row`
   sees nothing clean: that is the plain masked model of diffusion.py.

So the same weights write in several modes: "causal", in blocks of any size, and "row".

How a story ends. In the causal mode and in blocks the length is not known: [EOS] is predicted. What
follows it in its block is [PAD], hidden like the rest; a hidden place behind a visible [EOS] or
[PAD] of its block is [PAD] for certain and costs nothing, so that a sample is always text, [EOS]
and nothing else, and a story's probability that of the block's tokens. Blocks are counted from the
row's first token. A row that ends without [EOS] (a long story goes on in the next one) has no
places behind its end; what its length costs is in `extra_nats`, as for the left-to-right twin.
"""

from cli import require

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from corpus.tokens import BOS, EOS, MASK, PAD, maskable, round_up
from diffusion import DiscreteDiffusion, hide_some
from kinds.autoregressive import Autoregressive, before_each, next_tokens
from kinds.likelihood import ConditionsOf, Corrupted, Nelbo, first_pass, measure_nats
from model import Ends
from network.attention import HIDDEN, Context, View
from network.hardware import pick_device
from network.transformer import Known
from sampling.cached import CachedModel
from sampling.left_to_right import rows_of, write_blocks, write_causal
from sampling.noise import MASK_STREAM, SHIFT_STREAM
from sampling.sampler import GAP, Sampler

CAUSAL, ROW = "causal", "row"
WORDS = {CAUSAL: -1, ROW: 0}  # as sizes of blocks
LARGEST = 1024  # of the blocks
# Shares of a block that are hidden in training, by block size (arXiv 2503.09573, table 8: few and
# nearly all teach little there)
MASK_RANGES = ((4, (0.45, 0.95)), (32, (0.3, 0.8)))


def mask_range(size: int) -> tuple[float, float]:
    return next((between for largest, between in MASK_RANGES if size <= largest), (0.0, 1.0))


def read_sizes(text: str) -> tuple[int, ...]:
    """"causal,4,16,row" -> (-1, 4, 16, 0): sizes of blocks, 0 for the whole row, -1 for none."""
    words = text.split(",")
    require(all(map(is_mode, words)), f"--block_sizes {text}: write numbers of tokens from 1 to "
            f"{LARGEST}, {ROW} or {CAUSAL}, with a comma between them")
    return tuple(WORDS[word] if word in WORDS else int(word) for word in words)


def is_mode(word: str) -> bool:
    return word in WORDS or bool(re.fullmatch("[1-9][0-9]{0,3}", word)) and int(word) <= LARGEST


# ---- what is hidden ------------------------------------------------------------------------------

def in_blocks(tokens: Tensor, size: int) -> Tensor:
    """(B, L) -> (B, N, size), with [PAD] where the last block goes beyond the row."""
    behind = round_up(tokens.shape[1], size) - tokens.shape[1]
    return nn.functional.pad(tokens, (0, behind), value=PAD).unflatten(1, (-1, size))


def predicted(blocks: Tensor) -> Tensor:
    """Which tokens of blocks (..., S) are predicted: text, [EOS], and [PAD] behind it."""
    return (blocks >= EOS) | ((blocks == PAD) & (blocks == EOS).any(-1, keepdim=True))


def behind_the_end(blocks: Tensor, visible: Tensor) -> Tensor:
    """The places of blocks (..., S) behind an [EOS] or [PAD] that is `visible`, itself left out."""
    ends = visible & ((blocks == EOS) | (blocks == PAD))
    return ends.cumsum(-1) - ends.long() > 0


@dataclass
class NextTokens(Corrupted):
    """A batch for the causal mode: `noisy` is what stands before each token."""

    ends: ClassVar[tuple[int, ...]] = (EOS,)

    def hidden(self, model: nn.Module) -> Tensor:
        return causal_pass(model, self.noisy, self.context(model))[self.masked]


@dataclass
class Blocks(Corrupted):
    """A batch whose rows are cut into blocks, each row into those of its own `size`."""

    there: Tensor | None = None  # (B, L) bool: the places that a noisy token may look at
    size: Tensor | None = None  # (B,) int64: tokens of a block; 0: the row at once
    next_weight: Tensor | None = None  # (B, L) float32: the weights of pass 1
    flex: bool = False  # attention of cut rows by FlexAttention

    ends: ClassVar[tuple[int, ...]] = (EOS, PAD)

    @property
    def predicted(self) -> int:
        return super().predicted + int((self.next_weight > 0).sum())

    @property
    def passes(self) -> float:
        """Through the network, of a row on average."""
        return float((self.size != 0).float().mean() + (self.size >= 0).float().mean())

    @property
    def noisy_share(self) -> float:
        return float((self.size >= 0).float().mean())

    @property
    def left_out(self) -> int:
        return int((~self.masked[self.size == 0]).sum())  # of the rows that are not cut

    def hidden(self, model: nn.Module) -> Tensor:
        """Of rows that are all cut into blocks."""
        *_, (hidden, *_) = self.parts(model)
        return hidden

    def parts(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor, Ends]]:
        """Hidden states (M, D), targets (M,), weights (M,) and the special tokens that can be
        predicted: of the next tokens, of the blocks and of the whole rows, as far as there are any.

        A row that is not cut goes through the network once, in one way or the other.
        """
        ahead, whole = self[self.size != 0], self[self.size == 0]
        if len(ahead.tokens):
            context, known = ahead.context(model), []
            clean = causal_pass(model, before_each(ahead.tokens), context, known)
            yield (*ahead.chosen(clean, ahead.next_weight), NextTokens.ends)
            rows = ahead.size > 0
            cut = ahead[rows]
            if len(cut.tokens):
                noisy = cut.read_cut(model, context and context.of_rows(rows), [
                    (keys[rows], values[rows]) for keys, values in known])
                yield (*cut.chosen(noisy, cut.weight), self.ends)
        if len(whole.tokens):
            # Blocks may go beyond the longest row, where a whole one has nothing.
            whole = whole.up_to(model.config.max_len)
            yield whole.read_twice(model, None), whole.tokens[whole.masked], whole.weight[
                whole.masked], None  # its end is visible

    def up_to(self, length: int) -> "Blocks":
        """The first tokens of every row."""
        return self._each(lambda x: x[:, :length] if x.ndim == 2 and x is not self.condition else x)

    def read_cut(self, model: nn.Module, context: Context | None, known: Known) -> Tensor:
        """(B, L, D): what the model makes of rows that are all cut, with the keys and values of
        pass 1."""
        def read(rows: Tensor | None = None, **carried: Tensor) -> Tensor:
            part, here, before = (self, context, known) if rows is None else (
                self[rows], context and context.of_rows(rows),
                [(keys[rows], values[rows]) for keys, values in known])
            hidden = model.hidden(part.noisy, view=part.view(model), context=here, known=before,
                                  **carried)
            return hidden if rows is None else hidden[part.masked]
        return read(**first_pass(model, self.masked, self.ends, read))

    def chosen(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of (B, L, D) that count, their tokens and weights; L may be too short for others.
        """
        wanted = weight > 0
        return hidden[wanted[:, :hidden.shape[1]]], self.tokens[wanted], weight[wanted]

    def view(self, model: nn.Module) -> View:
        """What the noisy tokens of cut rows look at: L clean ones, of which the first is the [PAD]
        before the row, and then L noisy ones."""
        count, length = self.tokens.shape
        device = self.tokens.device
        place = torch.arange(length, device=device)
        if self.flex:
            mask = create_block_mask(lambda row, head, query, key: self.sees(
                row, head, query, key), count, None, length, 2 * length, device)  # no method
        else:
            row, key = torch.arange(count, device=device), torch.arange(2 * length, device=device)
            seen = self.sees(row[:, None, None], None, place[:, None], key)[:, None]
            mask = torch.zeros(seen.shape, dtype=model.compute_dtype, device=device)
            mask = mask.masked_fill(~seen, HIDDEN)  # (B, 1, L, 2L)
        return model.view(place, mask, causal=False)

    def sees(self, row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """Whether the noisy token at `query` looks at `key`, as FlexAttention asks it; all heads do
        the same."""
        size, length = self.size[row], self.tokens.shape[1]
        first = query // size * size  # of its block
        noisy = (key - length).clamp(min=0)
        same = (key >= length) & (noisy // size * size == first) & self.there[row, noisy]
        return (key <= first) | same  # of L clean ones as many as stand before the block, and [PAD]


def causal_pass(model: nn.Module, inputs: Tensor, context: Any = None, kept: Known | None = None,
                ) -> Tensor:
    """(B, L) tokens, of which the first stands before the row, at -1 -> (B, L, D)."""
    places = torch.arange(-1, inputs.shape[1] - 1, device=inputs.device)
    return model.hidden(inputs, view=model.view(places, causal=True), context=context, kept=kept)


# ---- the kind ------------------------------------------------------------------------------------

class JointDiffusion(DiscreteDiffusion):
    """Masked diffusion in blocks and left to right, by one network.

    `mode` is how it measures and writes: "causal", a block size as a word, or "row".
    """

    name, title = "joint", "joint model"
    objectives = ("joint",)
    from_left = True
    gap = GAP | dict(left_share=0.3)  # chosen on validation stories: docs/experiments.md
    own = frozenset(("block_sizes", "causal_share", "flex_attention"))
    unused = frozenset(("schedule", "time_conditioning"))
    unused_for = "the joint model masks by its own table, and knows no time"

    def __init__(self, sizes: tuple[int, ...] = (4, 16, 0), causal_share: float = 0.5,
                 mode: str = ROW, flex: bool = False, between: tuple[float, float] = (0.0, 1.0)):
        super().__init__(between=between)
        self.sizes, self.causal_share, self.mode, self.flex = sizes, causal_share, mode, flex

    @classmethod
    def of_run(cls, config: Any) -> "JointDiffusion":
        require(not config.fsdp, "--fsdp: a row of the joint model takes one pass or two, and "
                "processes that share their weights must all take as many; leave it out")
        sizes = read_sizes(config.block_sizes)
        require(any(sizes), f"--block_sizes {config.block_sizes}: whole rows alone are --objective "
                            f"masked_ce; add {CAUSAL} or the size of a block")
        require(0 in sizes or {config.t_min, config.t_max} <= {None, 0, 1}, "--t_min --t_max: "
                f"times of whole rows, which --block_sizes {config.block_sizes} has not; leave "
                "them out")
        require(not config.flex_attention or pick_device(config.device).type == "cuda",
                "--flex_attention: torch trains with it on a CUDA GPU alone; leave it out")
        return cls(sizes, config.causal_share, flex=config.flex_attention,
                   between=config.between)

    @classmethod
    def of_checkpoint(cls, checkpoint: dict) -> "JointDiffusion":
        sizes = checkpoint.get("train_config", {}).get("block_sizes")
        return cls() if sizes is None else cls(read_sizes(str(sizes)))

    def trained(self, stage: int) -> Callable[[str], bool]:
        return lambda name: not name.startswith("draft.")  # that is kinds/drafts.py's

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that it was trained for, the exact one first."""
        words = {size: word for word, size in WORDS.items()}
        return tuple(dict.fromkeys((CAUSAL, *(words.get(size, str(size)) for size in self.sizes))))

    def in_mode(self, mode: str) -> "JointDiffusion":
        """In blocks of any size, also of another than it was trained for."""
        require(is_mode(mode), f"--mode {mode}: choose {CAUSAL}, {ROW} or a block size from 1 to "
                               f"{LARGEST}")
        other = copy.copy(self)
        other.mode = mode
        return other

    @property
    def exact(self) -> bool:
        return self.mode in (CAUSAL, "1")

    # ---- training ----

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> "Blocks":
        """Hides tokens of rows (B, L), each row in blocks of one of the sizes, which take turns
        among the rows in a random order.

        Both passes count as the plain mean over what they predict, pass 1 with `causal_share` and
        pass 2 with the rest.
        """
        width = max(round_up(tokens.shape[1], max(size, 1)) for size in self.sizes)
        tokens = nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=PAD)
        order = torch.randperm(len(tokens), generator=generator)
        sizes = torch.tensor(self.sizes)[order % len(self.sizes)]  # (B,)
        noisy, masked = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
        there = torch.ones_like(masked)
        for size in {*self.sizes} - {WORDS[CAUSAL]}:
            rows = sizes == size
            if rows.any() and size:
                noisy[rows], masked[rows], there[rows] = self.hide(tokens[rows], size, generator)
            elif rows.any():
                whole = super().corrupt_batch(tokens[rows], generator)
                noisy[rows], masked[rows] = whole.noisy, whole.masked
        share = self.causal_share
        wanted = ((tokens >= EOS) & (sizes != 0)[:, None]).float()
        return Blocks(tokens, noisy, masked, masked * ((1 - share) / masked.sum().clamp(min=1)),
                      torch.ones(len(tokens)), there=there, size=sizes,
                      next_weight=wanted * (share / wanted.sum().clamp(min=1)), flex=self.flex)

    def hide(self, tokens: Tensor, size: int, generator: torch.Generator | None = None,
             ) -> tuple[Tensor, Tensor, Tensor]:
        """`noisy_blocks` of rows (B, L), at least one place of every block chosen, with shares
        stratified over all blocks. What is chosen behind a visible end is not hidden: in a block
        with an end that may be all."""
        can = predicted(in_blocks(tokens, size))  # (B, N, S)
        some = can.any(-1)
        shares = self.times(int(some.sum()), generator, mask_range(size))
        masked = torch.zeros_like(can)
        masked[some] = hide_some(can[some], shares, generator)[0]
        return noisy_blocks(tokens, masked)

    # ---- likelihood ----

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0,
              draws: int = 1, numbers: Iterable[np.ndarray] | None = None,
              conditions: ConditionsOf | None = None) -> Nelbo:
        """-log p of every row in this mode: exact in "causal" and "1", else a bound.

        Of a row cut into blocks it is the sum over blocks of n E_k[mean over the k hidden of -log
        p], k uniform on 1..n, each block given the clean ones before it: the chain rule over
        blocks, and the any-order bound of diffusion.py in each. [EOS], and [PAD] where it is not
        certain, count in the nats and not in the tokens. The blocks of a row are measured together,
        each with a k of its own.
        """
        if self.mode == ROW:
            return super().nelbo(model, batches, seed, draws, numbers, conditions)
        if self.mode == CAUSAL:
            return measure_nats(model, batches, lambda clean, rows: [
                (next_tokens(clean, NextTokens), maskable(clean).sum(1))], numbers, conditions)
        size = int(self.mode)

        def hide(clean: Tensor, rows: np.ndarray) -> Iterator[tuple[Corrupted, Tensor]]:
            text = maskable(clean).sum(1)
            wide = nn.functional.pad(clean, (0, -clean.shape[1] % size), value=PAD)
            for draw in range(draws):
                masked, weight = stratified_blocks(wide, size, rows, draw, draws, seed)
                noisy, wanted, there = noisy_blocks(wide, masked)
                yield Blocks(wide, noisy, wanted, weight * wanted, torch.ones(len(wide)),
                             there=there, size=torch.full((len(wide),), size),
                             next_weight=torch.zeros(wide.shape)), text

        return measure_nats(model, batches, hide, numbers, conditions)

    def extra_nats(self, meta: dict, rows: Iterable[np.ndarray]) -> float:
        """What a text's code needs besides the tokens: the kind and length of every row, or where
        [EOS] is predicted the kind, and the length of those alone that end without it."""
        return (super().extra_nats(meta, rows) if self.mode == ROW
                else Autoregressive().extra_nats(meta, rows))

    # ---- writing ----

    def reader(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
               ) -> CachedModel:
        return CachedModel(model, sampler, conditions)

    def write(self, model: nn.Module, lengths: Sequence[int], sampler: Sampler, seed: int = 0,
              conditions: np.ndarray | None = None) -> list[np.ndarray]:
        """In this mode; but for "row" the stories end where the model ends them, whatever
        `lengths` are, or with the longest row."""
        if self.mode == ROW:
            return super().write(model, lengths, sampler, seed, conditions)
        starts = [np.array([BOS])] * len(lengths)
        reader, longest = self.reader(model, sampler, conditions), model.config.max_len
        pieces = (write_causal(reader, starts, sampler, longest, seed) if self.mode == CAUSAL else
                  write_blocks(reader, starts, sampler, int(self.mode), longest, seed))
        return rows_of(pieces, starts)

    def fill(self, model: nn.Module, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
             ) -> list[np.ndarray]:
        """As whole rows; in the mode "causal" every token from what stands to its left alone."""
        if self.mode != CAUSAL:
            return super().fill(model, rows, sampler, seed)
        reader = CachedModel(model, replace(sampler, left_share=0.0), ends=())
        filled = [row.copy() for row in rows]
        for number, row in enumerate(filled):
            while (hidden := np.flatnonzero(row == MASK)).size:
                start = int(hidden[0])
                end = start + int(np.argmin(np.append(row[start:] == MASK, False)))  # of this gap
                pieces = write_causal(reader, [row[:start]], sampler, end, seed, [number])
                row[start:end] = np.concatenate([piece.tokens for piece in pieces])
        return filled

    def gap_nats(self, model: nn.Module, row: np.ndarray, gap: np.ndarray,
                 left_share: float = 0.0) -> float:
        """As that of whole rows; in the mode "causal" given the left side alone."""
        if self.mode != CAUSAL:
            return super().gap_nats(model, row, gap, left_share)
        reader = CachedModel(model, Sampler(), ends=())
        reader.begin(np.arange(1))
        before = np.concatenate([[PAD], row[:-1]])  # the i-th is followed by token i
        logits = torch.from_numpy(reader.read(before[None], logits=len(row))[0])  # (L, V)
        nats = -logits.log_softmax(-1)[torch.arange(len(row)), torch.from_numpy(row)]
        return float(nats[torch.from_numpy(gap == MASK)].sum())

    def fill_best(self, model: nn.Module, rows: Sequence[np.ndarray], sampler: Sampler,
                  seed: int = 0, candidates: int = 8) -> list[np.ndarray]:
        """The rows with something in the place of every [MASK]: of so many candidates, drawn with
        both sides in view ("row"), that which is likeliest as a whole from left to right."""
        sampler = replace(sampler, left_share=0.0)
        drafts = [super(JointDiffusion, self).fill(model, rows, sampler, seed + k)
                  for k in range(candidates)]
        nats = np.array([self.in_mode(CAUSAL).nelbo(model, (row[None] for row in filled)).nats
                         for filled in drafts])  # (candidates, rows)
        return [drafts[k][i] for i, k in enumerate(nats.argmin(0))]

    def protocol(self, draws: int) -> str:
        if self.mode == ROW:
            return super().protocol(draws)
        if self.mode == CAUSAL:
            return Autoregressive().protocol(draws)
        return (f"blocks of {self.mode}, any-order NELBO in each, mask count stratified over 1..n, "
                f"{draws} masks a row, [EOS] predicted")


def noisy_blocks(tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, L) with the places hidden that are marked in (B, N, S): the noisy rows, what in them
    is to be predicted, and which places are there at all; (B, L) each.

    A place behind a visible end is not hidden: it is [PAD] for certain.
    """
    blocks = in_blocks(tokens, masked.shape[-1])
    can = predicted(blocks)
    wanted = masked & ~behind_the_end(blocks, can & ~masked)
    length = tokens.shape[1]
    return tuple(x.flatten(1)[:, :length] for x in (
        blocks.masked_fill(wanted, MASK), wanted, can | (blocks != PAD)))


def stratified_blocks(tokens: Tensor, size: int, rows: np.ndarray, draw: int, draws: int,
                      seed: int) -> tuple[Tensor, Tensor]:
    """Masks (B, N, S) that hide k of the n places of every block, k stratified over 1..n; and the
    weight n/k of every place, (B, L).

    The quantiles of k follow a golden-ratio sequence over rows, draws and blocks, shifted at
    random: even over any run of them, uniform for each.
    """
    can = predicted(in_blocks(tokens, size)).numpy()  # (B, N, S)
    n = can.sum(-1)  # (B, N)
    shift = np.random.default_rng([SHIFT_STREAM, seed]).random()
    number = (rows[:, None] * draws + draw) * 1.0 + np.arange(n.shape[1]) * (2 ** 0.5 - 1)
    k = np.floor((shift + number * ((5 ** 0.5 - 1) / 2)) % 1 * n).astype(np.int64) + 1
    noise = np.stack([np.random.default_rng([MASK_STREAM, seed, row, draw]).random(
        can.shape[1:]) for row in rows])
    order = np.where(can, noise, 2.0).argsort(-1).argsort(-1)  # the place of each in a random order
    masked = can & (order < k[..., None])
    weight = np.repeat(n / k, size, axis=1)[:, :tokens.shape[1]]
    return torch.from_numpy(masked), torch.from_numpy(weight).float()
