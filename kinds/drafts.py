"""Training the head with which a joint model drafts. A library of kinds/registry.py.

    python train.py --objective draft --init_from joint/best.pt --checkpoint_dir joint_drafts

The network stays as it is; only its DraftHead learns, on blocks as `generate.py --verify` drafts
them: the first token of each is known to the network, or with --ahead to the head alone, and all
others are hidden. The result is a joint checkpoint.
"""

from cli import require

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from block_diffusion import CAUSAL, Blocks, JointDiffusion, in_blocks, noisy_blocks, predicted
from corpus.tokens import MASK
from kinds.autoregressive import before_each
from kinds.kind import NETWORK_SETTINGS
from kinds.likelihood import Nelbo
from model import DiffusionTransformer
from network.hardware import device_of


class DraftTraining(JointDiffusion):
    """A joint model whose draft head is in training."""

    objectives = ("draft",)
    of_text = False
    init_kinds = (JointDiffusion.name,)
    keeps_settings = (*NETWORK_SETTINGS, "block_sizes")  # the model stays what it is
    own = frozenset(("draft_rank", "draft_size"))
    unused = frozenset((*JointDiffusion.unused, *keeps_settings, "causal_share", "dropout"))
    unused_for = "the draft head alone is trained"

    def __init__(self, size: int):
        super().__init__((size,), mode=CAUSAL)

    @classmethod
    def of_run(cls, config: Any) -> "DraftTraining":
        require(config.init_from or config.resume, "--objective draft needs a joint model: name "
                                                   "its checkpoint with --init_from")
        require(not config.fsdp, "--fsdp: the draft head is small; leave it out")
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
        """Rows (B, L) in blocks of which everything is hidden, or in every other row all but the
        first token; what comes first is never drafted. Nothing is random."""
        size, = self.sizes
        tokens = nn.functional.pad(tokens, (0, -tokens.shape[1] % size))
        masked = predicted(in_blocks(tokens, size))  # (B, N, S)
        masked[::2, :, 0] = False
        noisy, wanted, there = noisy_blocks(tokens, masked)
        wanted[:, ::size] = False
        return Blocks(tokens, noisy, wanted, wanted / wanted.sum().clamp(min=1),
                      torch.ones(len(tokens)), there=there,
                      size=torch.full((len(tokens),), size), next_weight=torch.zeros(tokens.shape))

    def loss(self, model: nn.Module, batch: Blocks) -> Tensor:
        with torch.no_grad():
            hidden = batch.hidden(model)
        return model.draft.loss(*of_drafts(model, batch, hidden), batch.weight[batch.masked])

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0,
              draws: int = 1, numbers: Iterable[np.ndarray] | None = None,
              conditions: None = None) -> Nelbo:
        """-log q of the drafted tokens, each given the one before: how well it drafts, and no
        likelihood of a text."""
        device, columns, seen, training = device_of(model), [], 0, model.training
        numbers = iter(numbers) if numbers is not None else None
        model.eval()
        for batch in batches:
            drafts = self.corrupt_batch(torch.from_numpy(batch))
            rows = next(numbers) if numbers else seen + np.arange(len(batch))
            owner, seen = drafts.masked.nonzero()[:, 0].numpy(), seen + len(batch)
            there = drafts.to(device)
            with torch.no_grad():
                nats, right = model.draft.scores(*of_drafts(model, there, there.hidden(model)))
            count, nats, right = (np.bincount(owner, x, minlength=len(batch)) for x in (
                None, nats.cpu().double().numpy(), right.cpu().numpy()))
            some = count > 0  # a row of one token has nothing to draft
            columns.append([x[some] for x in (rows, count, count, nats, right)])
        model.train(training)
        return Nelbo(*map(np.concatenate, zip(*columns, strict=True)))

    @property
    def likelihood_name(self) -> str:
        return "draft loss"


def of_drafts(model: DiffusionTransformer, batch: Blocks, hidden: Tensor) -> tuple[Tensor, ...]:
    """What a DraftHead's loss and scores take of the masked positions (M,): their hidden states,
    the vocabulary head, the tokens on their left, whether those were drafted, and themselves."""
    return (hidden, model.vocabulary.weight, model.head_bias(hidden, batch.ends),
            before_each(batch.tokens)[batch.masked],
            before_each(batch.noisy)[batch.masked] == MASK, batch.tokens[batch.masked])


