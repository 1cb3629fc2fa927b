"""A torch model in front of a cache of what is finished: the `Reader` of left_to_right.py. A
library for the kinds that write from the left.
"""

from cli import require

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from corpus.tokens import EOS, MASK, PAD
from network.attention import Cache, Context
from sampling.draft_head import DraftHead
from sampling.drawing import end_blocks
from sampling.loop import Carried, only_hidden
from sampling.sampler import Sampler
from sampling.step import Drawing, UnmaskStep, numpy_run


class CachedModel:
    """Reads causally and looks at blocks in both directions, all behind one cache.

    A token sees at most the `max_len` before it, as in training: rows may be of any length. With a
    condition and guidance there are two caches, with the condition and without.
    """

    def __init__(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
                 ends: tuple[int, ...] = (EOS,), block_ends: tuple[int, ...] = (EOS, PAD)):
        require(not sampler.left_share, "--left_share: blocks know their left side already; leave "
                                        "it out")
        sampler = sampler.drawing
        self.model, self.sampler, self.ends, self.block_ends = model, sampler, ends, block_ends
        self.drawing = Drawing(BlockStep(self), model, sampler, conditions)
        self.numbers = np.zeros(0, np.int64)
        self.given: list[Context | None] = []  # one entry for every evaluation that guidance needs
        self.caches: list[Cache] = []

    @functools.cached_property
    def draft_head(self) -> DraftHead | None:
        head = getattr(self.model, "draft", None)
        return head and DraftHead(head_parts(head))

    # ---- Reader ----

    def begin(self, rows: np.ndarray) -> None:
        self.numbers = np.asarray(rows)
        self.given = self.drawing.step.contexts_for(self.drawing.context(self.numbers))
        # The first token is the [PAD] before the row.
        self.caches = [Cache(first=-1, window=self.model.config.max_len + 1) for _ in self.given]

    @torch.no_grad()
    def read(self, tokens: np.ndarray, logits: int = 0) -> np.ndarray | None:
        hidden = self.passes(self.drawing.tensor(tokens), causal=True)
        self.last = hidden[0]  # with guidance that with the condition
        if not logits:
            return None
        return self.logits([h[:, -logits:] for h in hidden], self.ends).cpu().numpy()

    @torch.no_grad()
    def look(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(places)[None].expand(len(tokens), -1).to(self.drawing.device)
        hidden = self.passes(self.drawing.tensor(tokens), causal=False, at=at)
        return self.logits(hidden, self.ends).cpu().numpy()

    def hidden(self, places: np.ndarray) -> np.ndarray:
        return self.last[torch.arange(len(places)), torch.from_numpy(places)].float().cpu().numpy()

    @torch.no_grad()
    def step(self, tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
             carried: Carried = None) -> tuple[np.ndarray, np.ndarray, Carried]:
        # All rows of the batch go through the network, for the cache has all; what nobody asked for
        # is thrown away. (Were nothing carried to it, it would be looked at once more.)
        chosen = np.flatnonzero(np.isin(self.numbers, rows))  # `rows` keep the batch's order
        full = []
        for x, value in ((tokens, MASK), (count, 0), (noise, 0.0), (carried, 1.0)):
            if x is not None:
                y = np.full((len(self.numbers), *x.shape[1:]), value, x.dtype)
                y[chosen] = x
            full.append(None if x is None else y)
        new, confidence, made = numpy_run(self.drawing, *full[:3], None, full[3])
        new, confidence = end_blocks(new[chosen], confidence[chosen])
        return new, confidence, None if made is None else only_hidden(made[chosen], new)

    def forget(self, counts: np.ndarray) -> None:
        for cache in self.caches:
            cache.keep_tokens(torch.from_numpy(counts))

    def keep(self, rows: np.ndarray) -> None:
        marked = torch.from_numpy(rows)
        self.numbers = self.numbers[rows]
        for cache in self.caches:
            cache.keep_rows(marked)
        there = marked.to(self.drawing.device)
        self.given = [given and given.of_rows(there) for given in self.given]

    # ---- network ----

    def passes(self, tokens: Tensor, causal: bool, at: Tensor | None = None,
               carried: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, L, D) or (B, C, D) of the next tokens (B, L), for every evaluation; a
        causal pass stays in the cache. `carried` (B, L, 2K) is what the step before expected."""
        results, more = [], {} if carried is None else {"carried": carried}
        for cache, given in zip(self.caches, self.given, strict=True):
            cache.looking = not causal
            view = self.model.view(tokens.shape[1], cache=cache, causal=causal)
            results.append(self.model.hidden(tokens, context=given, at=at, view=view, **more))
        return results

    def logits(self, hidden: Sequence[Tensor], ends: tuple[int, ...]) -> Tensor:
        return self.drawing.step.guided([self.model.head(h, ends).float() for h in hidden])


def head_parts(head: nn.Module) -> dict[str, np.ndarray]:
    """The matrices of a model's draft head, by name."""
    return {name: part.cpu().numpy() for name, part in head.parts().items()}


class BlockStep(UnmaskStep):
    """The unmasking step on blocks behind the cache of a CachedModel."""

    def __init__(self, cached: CachedModel):
        super().__init__(cached.model, cached.sampler)
        self.cached = cached

    def logits(self, tokens: Tensor, positions: Tensor, ratio: Tensor, context: Context | None,
               carried: Tensor | None = None) -> Tensor:
        hidden = self.cached.passes(tokens, causal=False, at=positions, carried=carried)
        return self.cached.logits(hidden, self.cached.block_ends)
