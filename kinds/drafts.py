"""Training the head with which a joint model drafts. A library of kinds/registry.py.

    python train.py --objective draft --init_from joint/best.pt --checkpoint_dir joint_drafts

The network stays as it is; only its DraftHead learns, in both of the ways in which `generate.py
--verify` drafts: alone behind what a causal pass made of a token, and beside the network's look at
a block of hidden tokens. It learns from the causal mode's whole distribution at every place, which
is what verifies a draft. The result is a joint checkpoint.
"""

from cli import require

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from block_diffusion import (
    CAUSAL,
    Blocks,
    JointDiffusion,
    NextTokens,
    causal_pass,
    in_blocks,
    noisy_blocks,
    predicted,
)
from corpus.tokens import BOS, EOS
from kinds.autoregressive import before_each
from kinds.kind import NETWORK_SETTINGS
from kinds.likelihood import Nelbo
from model import DiffusionTransformer
from network.hardware import device_of

CHAIN = 4  # drafted tokens behind a place; later ones come by the same recurrence
PLACES = 4096  # about so many at a time: all their logits are written out


class DraftTraining(JointDiffusion):
    """A joint model whose draft head is in training."""

    objectives = ("draft",)
    of_text = first_passes = False
    init_kinds = (JointDiffusion.name,)
    keeps_settings = (*NETWORK_SETTINGS, "block_sizes")  # the model stays what it is
    own = frozenset(("draft_rank", "draft_size"))
    unused = frozenset((*JointDiffusion.unused, *keeps_settings, "causal_share", "dropout",
                        "t_min", "t_max"))
    unused_for = "the draft head alone is trained"

    def __init__(self, size: int):
        super().__init__((size,), mode=CAUSAL)

    @classmethod
    def of_run(cls, config: Any) -> "DraftTraining":
        require(config.init_from or config.resume, "--objective draft needs a joint model: name "
                                                   "its checkpoint with --init_from")
        require(not config.fsdp, "--fsdp: the draft head is small; leave it out")
        require(not config.teachers, f"--teachers: {cls.unused_for}; leave it out")
        require(1 <= config.draft_rank <= 4096, f"--draft_rank {config.draft_rank}: must be from 1 "
                                                "to 4096")
        require(2 <= config.draft_size <= 1024, f"--draft_size {config.draft_size}: must be from 2 "
                                                "to 1024")
        return cls(config.draft_size)

    @property
    def modes(self) -> tuple[str, ...]:
        return ()

    def network_settings(self, config: Any) -> dict[str, Any]:
        return {"draft_rank": config.draft_rank}

    def trained(self, stage: int) -> Callable[[str], bool]:
        return lambda name: name.startswith("draft.")

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Blocks:
        """Rows (B, L) in blocks of which all but the first token is hidden, as the network drafts.
        Nothing is random.

        `masked` are the hidden tokens to learn from, `next_weight` marks where the head drafts
        alone: it is told the token there. Every draft counts alike.
        """
        size, = self.sizes
        tokens = nn.functional.pad(tokens, (0, -tokens.shape[1] % size))
        hidden = predicted(in_blocks(tokens, size))  # (B, N, S)
        hidden[:, :, 0] = False
        noisy, wanted, there = noisy_blocks(tokens, hidden)
        wanted &= tokens >= EOS
        starts = tokens_told(tokens)
        count = wanted.sum() + sum(alive.sum() for alive in chain(tokens, starts))
        return Blocks(tokens, noisy, wanted, wanted / count.clamp(min=1), torch.ones(len(tokens)),
                      there=there, size=torch.full((len(tokens),), size),
                      next_weight=starts / count.clamp(min=1))

    def loss(self, model: nn.Module, batch: Blocks) -> Tensor:
        """The mean cross-entropy of drafts with what verifies them, in nats, or a part's share."""
        parts = list(in_parts(batch))
        if len(parts) == 1:
            return weighted(model, batch)
        # the logits of one part at a time, once more on the way back
        return sum(checkpoint(weighted, model, part, use_reentrant=False) for part in parts)

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0,
              draws: int = 1, numbers: Iterable[np.ndarray] | None = None,
              conditions: None = None) -> Nelbo:
        """How well it drafts, which is no likelihood of a text: `nats` are the loss, and `correct`
        is the share of drafts that would stand, the sum over tokens of min(p, q)."""
        device, columns, seen, training = device_of(model), [], 0, model.training
        numbers = iter(numbers) if numbers is not None else None
        model.eval()
        for batch in batches:
            rows = next(numbers) if numbers else seen + np.arange(len(batch))
            seen += len(batch)
            for part in in_parts(self.corrupt_batch(torch.from_numpy(batch)).to(device)):
                with torch.no_grad():
                    owner, _, nats, stand = (torch.cat(x).cpu().numpy() for x in zip(
                        *drafts(model, part), strict=True))
                size = len(part.tokens)
                count, nats, stand = (np.bincount(owner, x, minlength=size)
                                      for x in (None, nats, stand))
                some = count > 0  # a row of one token has nothing to draft
                columns.append([x[some] for x in (rows[:size], count, count, nats, stand)])
                rows = rows[size:]
        model.train(training)
        return Nelbo(*map(np.concatenate, zip(*columns, strict=True)))

    @property
    def likelihood_name(self) -> str:
        return "draft loss"


def in_parts(batch: Blocks) -> Iterator[Blocks]:
    size = max(1, PLACES // batch.tokens.shape[1])
    for start in range(0, len(batch.tokens), size):
        yield batch[start:start + size]


def tokens_told(tokens: Tensor) -> Tensor:
    """Of which tokens a head that drafts alone is told: text, and what begins a story."""
    return (tokens > EOS) | (tokens == BOS)


def chain(tokens: Tensor, starts: Tensor) -> Iterator[Tensor]:
    """Which of the starts, both (B, L), have a first, second, ... draft behind them, (B, L)."""
    told, there = tokens_told(tokens), tokens >= EOS
    for k in range(min(CHAIN, tokens.shape[1] - 1)):
        behind = nn.functional.pad(told[:, k:-1] & there[:, k + 1:], (0, k + 1))
        starts = starts & behind
        yield starts


def weighted(model: DiffusionTransformer, batch: Blocks) -> Tensor:
    return sum((weight * nats).sum() for _, weight, nats, _ in drafts(model, batch))


def drafts(model: DiffusionTransformer, batch: Blocks,
           ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of the drafts of a batch, M at a time, (M,) each: their rows, their weights, the
    cross-entropy of q with the causal mode's p at that place, and the sum over tokens of min(p, q).

    First those of the network's look at a block, to which the head adds what the token before says;
    then those of the head alone, the first, second, ... behind every place where it starts.
    """
    tokens, head, known = batch.tokens, model.draft, []
    with torch.no_grad():
        clean = causal_pass(model, before_each(tokens), kept=known)
        noisy = model.hidden(batch.noisy, view=batch.view(model), known=known)
        said = model.head(clean, NextTokens.ends).float().softmax(-1)  # (B, L, V)

    def compared(row: Tensor, place: Tensor, weight: Tensor, logits: Tensor,
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        drafted = slice(EOS, logits.shape[-1])
        p = said[row, place, drafted]
        q = logits[:, drafted].log_softmax(-1)
        return row, weight, -(p * q).sum(-1), torch.minimum(p, q.detach().exp()).sum(-1)

    row, place = batch.masked.nonzero().T
    with torch.no_grad():
        looked = model.head(noisy[row, place], NextTokens.ends).float()
    left = batch.noisy[row, place - 1] != tokens[row, place - 1]  # hidden itself: drafted too
    told = head.told(tokens[row, place - 1]) * left[:, None]
    yield compared(row, place, batch.weight[row, place], looked + nn.functional.pad(
        told, (0, looked.shape[1] - told.shape[1])))
    starts = batch.next_weight > 0
    row, start = starts.nonzero().T
    state = head.start(clean[row, start])
    for k, alive in enumerate(chain(tokens, starts)):
        goes_on = alive[row, start]
        row, start, state = (x[goes_on] for x in (row, start, state))
        state = head.after(state, tokens[row, start + k])
        yield compared(row, start + k + 1, batch.next_weight[row, start], head.logits(state))
