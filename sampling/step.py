"""The unmasking step of a torch model: which positions, which tokens. A library for whatever
samples with torch.

    step = numpy_step(model, Sampler(steps=64))      # for the loop of loop.py
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import MASK, PAD, maskable
from network.attention import Context, take
from network.hardware import device_of
from network.layers import CARRIED, likeliest
from sampling.loop import Carried, Choice, RowCache, Step
from sampling.sampler import ADAPTIVE_PACES, Sampler


class UnmaskStep(nn.Module):
    """One unmasking step: network and token choice in one module. Logits never leave it.

    Positions are chosen first, tokens drawn only there. A token is drawn by inverting the
    distribution function in FP64 with one uniform number, which is exact; FP32 Gumbel noise with a
    floor would lower the effective temperature (arXiv 2409.02908).

    With a condition and `guidance` g a token is drawn from p(x | condition)^g p(x)^(1 - g), up to
    its norm: classifier-free guidance (arXiv 2207.12598 eq. 6, with g = 1 + w). g = 1 is the
    conditional model alone and g = 0 the unconditional one, both with one network evaluation.
    """

    def __init__(self, model: nn.Module, sampler: Sampler):
        super().__init__()
        self.model, self.sampler = model, sampler

    def forward(self, tokens: Tensor, count: Tensor, temperature: Tensor, noise: Tensor,
                most_hidden: int, most_count: int, context: Context | None = None,
                carried: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            tokens: (B, L) int64, hidden ones are [MASK].
            count: (B,) int64, how many to uncover in each row; an adaptive pace may take more.
            temperature: () float32; 0 is greedy.
            noise: (B, 2, L) uniforms in [0, 1): for the order, for the token.
            most_hidden, most_count: at least the largest number hidden and of `count` in the batch.
                Plain numbers, for they are shapes.
            context: of the conditions of these rows, from the model's `encode`.
            carried: (B, L, 2K), for a model with self-conditioning what it expected of these rows
                in the step before (`likeliest`). Rows of which nothing is known (zeros; None: of
                all of them) are looked at once before, as in training.
        Returns: the new tokens (B, L); confidence (B, L) float32: the probability, at temperature
            1, of each token drawn now, 0 elsewhere; and what is carried on, zeros where nothing is
            hidden any more, or None.
        """
        sampler = self.sampler
        masked = tokens == MASK  # (B, L)
        ratio = masked.sum(1) / maskable(tokens).sum(1).clamp(min=1)
        adaptive = sampler.pace in ADAPTIVE_PACES
        # 1. Score the hidden positions, the best first, and choose `count` of every row, or more
        #    where the pace finds the network sure of them.
        carries = bool(getattr(self.model, "self_conditioning", 0))
        if carries:  # then everything hidden has to be worked out
            carried = self.known(tokens, most_hidden, ratio, context, carried)
        first = FIRST[sampler.order](noise[:, 0]) if sampler.order in FIRST else None  # (B, L)
        if first is not None and not adaptive:
            candidates = best_first(first.masked_fill(~masked, -1),
                                    most_hidden if carries else most_count)
            every = self.logits(tokens, candidates, ratio, context, carried)  # (B, M, V)
            positions, logits = candidates[:, :most_count], every[:, :most_count]  # (B, C, V)
            if sampler.left_share:
                logits = self.with_left(tokens, positions, logits, context)
            confident = None
        else:
            candidates = best_first(masked.int(), most_hidden)  # (B, M)
            every = self.logits(tokens, candidates, ratio, context, carried)  # (B, M, V)
            score = (SCORES[sampler.order](every) if first is None
                     else first.gather(1, candidates))  # (B, M)
            score = score.masked_fill(~masked.gather(1, candidates), -math.inf)
            chosen = best_first(score, most_hidden if adaptive else most_count)  # (B, C)
            positions, logits = candidates.gather(1, chosen), take(every, chosen)
            confident = self.confident(logits) if adaptive else None
        wanted = torch.arange(positions.shape[1], device=tokens.device) < count[:, None]  # (B, C)
        if confident is not None:
            wanted = (wanted | confident) & masked.gather(1, positions)
            needed = columns_of(wanted)  # no more are drawn
            positions, logits, wanted = (x[:, :needed] for x in (positions, logits, wanted))
        # 2. Draw their tokens and write them where the row still has some to uncover.
        drawn = draw(logits, noise[:, 1].gather(1, positions), temperature, sampler.top_k,
                     sampler.top_p)
        probability = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]  # (B, C)
        drawn = torch.where(wanted, drawn, tokens.gather(1, positions))
        new = tokens.scatter(1, positions, drawn)
        confidence = torch.zeros_like(tokens, dtype=torch.float32)
        confidence = confidence.scatter(1, positions, probability * wanted)
        return new, confidence, carried_on(new, candidates, every) if carries else None

    def known(self, tokens: Tensor, most_hidden: int, ratio: Tensor, context: Context | None,
              carried: Tensor | None) -> Tensor:
        """(B, L, 2K): what is carried to a step, where that is nothing what a pass over the row
        expects."""
        if carried is None:
            carried = torch.zeros(*tokens.shape, 2 * CARRIED, device=tokens.device)
        fresh = ~carried.flatten(1).any(1)  # (B,)
        if not fresh.any():
            return carried
        places = best_first((tokens == MASK).int(), most_hidden)
        first = carried_on(tokens, places, self.logits(tokens, places, ratio, context))
        return torch.where(fresh[:, None, None], first, carried)

    def with_left(self, tokens: Tensor, positions: Tensor, logits: Tensor, context: Context | None,
                  ) -> Tensor:
        """(B, C, V): at the first of the positions, left of which nothing is hidden, those of both
        sides and of the left-to-right mode, by their shares."""
        first, share = positions[:, :1], self.sampler.left_share
        before = F.pad(tokens[:, :-1], (1, 0), value=PAD)
        view = self.model.view(torch.arange(tokens.shape[1], device=tokens.device) - 1, causal=True)
        left = self.guided([self.model.head(take(self.model.hidden(
            before, view=view, context=given), first)).float()
            for given in self.contexts_for(context)])
        mixed = (1 - share) * logits[:, :1] + share * left
        return torch.cat([mixed, logits[:, 1:]], 1)

    def logits(self, tokens: Tensor, positions: Tensor, ratio: Tensor, context: Context | None,
               carried: Tensor | None = None) -> Tensor:
        """FP32 logits (B, C, V) at positions (B, C): with the condition, without it, or for
        guidance of both."""
        more = {} if carried is None else {"carried": carried}
        return self.guided([self.model.head(self.model.hidden(
            tokens, ratio, context=given, at=positions, **more)).float()
            for given in self.contexts_for(context)])

    def contexts_for(self, context: Context | None) -> list[Context | None]:
        """The contexts of the network evaluations that guidance needs."""
        guidance = self.sampler.guidance
        return ([None] if context is None or guidance == 0 else
                [context] if guidance == 1 else [context, None])

    def guided(self, each: list[Tensor]) -> Tensor:
        """FP32 logits of these evaluations -> those to draw from."""
        first, *second = each
        # The head's FP16 stand-in for -inf must not survive a high temperature.
        impossible = first <= -1e4
        if second:
            first = second[0] + self.sampler.guidance * (first - second[0])
        return first.masked_fill(impossible, -math.inf)

    def confident(self, logits: Tensor) -> Tensor:
        """Which of the positions, the best first, an adaptive pace uncovers: (B, C) bool.

        "entropy_bound" takes the longest beginning with sum H - max H <= gamma. H is the entropy of
        a position: that bounds, in nats, by how much their joint distribution can differ from the
        product of their own (EB-Sampler, arXiv 2505.24857).
        """
        if self.sampler.pace == "threshold":
            return confidence_score(logits) >= self.sampler.threshold
        entropy = -entropy_score(logits)
        return entropy.cumsum(1) - entropy.cummax(1).values <= self.sampler.gamma


def columns_of(wanted: Tensor) -> int:
    """The first columns of (B, C) bool that hold all that is marked; at least one."""
    places = torch.arange(wanted.shape[1], device=wanted.device)
    return int((wanted.any(0) * places).max()) + 1


def carried_on(tokens: Tensor, places: Tensor, logits: Tensor) -> Tensor:
    """(B, L, 2K): what logits (B, M, V) at places (B, M) expect where rows (B, L) are hidden."""
    expected = likeliest(logits)  # (B, M, 2K)
    carried = expected.new_zeros(*tokens.shape, expected.shape[2])
    carried = carried.scatter(1, places[..., None].expand_as(expected), expected)
    return carried * (tokens == MASK)[..., None]


def confidence_score(logits: Tensor) -> Tensor:
    """The largest probability, (...) of (..., V)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def margin_score(logits: Tensor) -> Tensor:
    """The largest probability less the second (arXiv 2502.06768)."""
    best = logits.topk(2, dim=-1).values
    return (best[..., 0] - logits.logsumexp(-1)).exp() - (best[..., 1] - logits.logsumexp(-1)).exp()


def entropy_score(logits: Tensor) -> Tensor:
    """Minus the entropy in nats."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def leftmost(noise: Tensor) -> Tensor:
    """(B, L): from 1 down to above 0."""
    length = noise.shape[1]
    return (1 - torch.arange(length, device=noise.device, dtype=noise.dtype) / length).expand_as(
        noise)


# Orders that need the network's logits (B, L, V), and those that need none, only uniforms (B, L)
SCORES = {"confidence": confidence_score, "margin": margin_score, "entropy": entropy_score}
FIRST = {"random": lambda noise: noise, "left": leftmost}


def best_first(score: Tensor, count: int) -> Tensor:
    """(B, L) scores -> (B, count) positions of the highest; of equals the leftmost first."""
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: int = 0, top_p: float = 1.0,
         ) -> Tensor:
    """Draws a token for every (..., V) FP32 logits by one uniform (...) each: (...) int64."""
    best = logits.amax(-1, keepdim=True)  # subtracted first: a tiny temperature must not overflow
    scaled = keep_likeliest((logits - best) / temperature.clamp(min=1e-30), top_k, top_p)
    # MPS has no FP64: these few numbers go to the CPU.
    exact = torch.device("cpu") if logits.device.type == "mps" else logits.device
    drawn = draw_exactly(scaled.to(exact), uniform.to(exact)).to(logits.device)
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def draw_exactly(logits: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the distribution function, in FP64, exceeds `uniform`."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (..., V)
    total = cumulative[..., -1:]
    # Rounding may lift u * total up to the total, behind the last token.
    target = torch.minimum(uniform[..., None].double() * total, torch.nextafter(total, total * 0))
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


def keep_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets all logits to -inf but the `top_k` largest, and of these the smallest set of the
    likeliest tokens that reaches probability `top_p` (the token that crosses it is kept)."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # what the likelier tokens sum to
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    return logits


def together(contexts: Sequence[Context]) -> Context:
    """The contexts of single rows as that of a batch."""
    keys, values, bias = zip(*contexts, strict=True)
    return Context(torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(bias))


class Drawing:
    """What the step and the choice of one model, sampler and set of conditions have in common."""

    def __init__(self, step: UnmaskStep, model: nn.Module, sampler: Sampler,
                 conditions: np.ndarray | None):
        sampler.check()
        sampler.check_model(bool(getattr(model, "self_conditioning", 0)))
        self.step, self.device = step, device_of(model)
        self.temperature = torch.tensor(sampler.temperature, dtype=torch.float32,
                                        device=self.device)
        # On MPS the uniforms are coarser; the distribution function is in FP64 everywhere.
        self.precision = torch.float32 if self.device.type == "mps" else torch.float64
        self.contexts = (None if conditions is None or sampler.guidance == 0 else RowCache(
            lambda row: model.encode(self.tensor(conditions[row:row + 1]))))

    def tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def uniforms(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.precision).to(self.device)

    def context(self, rows: np.ndarray) -> Context | None:
        """That of the rows with these numbers."""
        return None if self.contexts is None else together(self.contexts.of(rows))


def numpy_step(model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None) -> Step:
    """The torch step of this model and sampler, for the NumPy loop of loop.py.

    `conditions`, N of them as the model's encoder takes them, belong to the rows with the numbers 0
    to N - 1.
    """
    drawing = Drawing(UnmaskStep(model, sampler), model, sampler, conditions)

    @torch.no_grad()  # (FSDP does not know inference mode)
    def run(tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
            carried: Carried = None):
        return numpy_run(drawing, tokens, count, noise, drawing.context(rows), carried)

    return run


def numpy_run(drawing: Drawing, tokens: np.ndarray, count: np.ndarray, noise: np.ndarray,
              context: Context | None, carried: Carried,
              ) -> tuple[np.ndarray, np.ndarray, Carried]:
    """Its step on arrays."""
    most_hidden = int((tokens == MASK).sum(1).max())
    new, confidence, made = drawing.step(
        drawing.tensor(tokens), drawing.tensor(count), drawing.temperature,
        drawing.uniforms(noise), most_hidden, int(count.max()), context,
        None if carried is None else drawing.tensor(carried))
    return (new.cpu().numpy(), confidence.cpu().numpy(),
            None if made is None else made.cpu().numpy())


def numpy_choice(model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
                 ) -> Choice:
    """Draws one token of every row among those allowed at its place, for `loop.draw_limited`.

    From the distribution that `numpy_step` would draw from, restricted to the allowed tokens and
    renormalised; temperature, top_k and top_p then apply to what is left. The probability is that
    of the drawn token among the allowed ones, at temperature 1.
    """
    drawing = Drawing(UnmaskStep(model, sampler), model, sampler, conditions)

    @torch.no_grad()
    def run(tokens: np.ndarray, place: np.ndarray, allowed: np.ndarray, uniform: np.ndarray,
            rows: np.ndarray):
        ids = drawing.tensor(tokens)
        ratio = (ids == MASK).sum(1) / maskable(ids).sum(1)
        context, carried = drawing.context(rows), None
        if getattr(model, "self_conditioning", 0):
            carried = drawing.step.known(ids, int((tokens == MASK).sum(1).max()), ratio, context,
                                         None)
        logits = drawing.step.logits(ids, drawing.tensor(place)[:, None], ratio, context, carried)
        logits = logits[:, 0].masked_fill(~drawing.tensor(allowed), -math.inf)
        drawn = draw(logits, drawing.uniforms(uniform), drawing.temperature, sampler.top_k,
                     sampler.top_p)  # (B,)
        probability = logits.softmax(-1).gather(-1, drawn[:, None])[:, 0]
        return drawn.cpu().numpy(), probability.cpu().numpy()

    return run
