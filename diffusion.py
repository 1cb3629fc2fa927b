"""The mathematics of masked diffusion: schedules, corruption, loss, likelihood bound, unmasking.

A library: nothing to run here.

    diffusion = DiscreteDiffusion(schedule="linear", objective="masked_ce")
    loss = diffusion.loss(model, tokens, generator)           # scalar, differentiable
    bound = diffusion.nelbo(model, batches)                   # bound.nats_per_token
    for state in diffusion.unmask(model, tokens, Sampler()):  # the loop of sampler.py
        ...

Forward process: at time t in (0, 1] every maskable token of a row becomes [MASK] independently
with probability m(t). [BOS], [EOS] and [PAD] are never masked and never in the loss.
"""

from cli import require

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_prep import EOS, MASK, length_nats
from layers import take
from model import Context, device_of
from sampler import ADAPTIVE_PACES, Choice, Kept, Sampler, State, Step, unmask

# ---- schedules -----------------------------------------------------------------------------------


class CosineSchedule:
    """m(t) = sin(pi t / 2): the share cos(pi (1 - t) / 2) of MaskGIT (arXiv 2202.04200)."""

    def mask_ratio(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def rate(self, t: Tensor) -> Tensor:
        """m'(t)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


class LinearSchedule:
    """m(t) = t."""

    def mask_ratio(self, t: Tensor) -> Tensor:
        return t

    def rate(self, t: Tensor) -> Tensor:
        """m'(t)."""
        return torch.ones_like(t)


SCHEDULES = {"cosine": CosineSchedule, "linear": LinearSchedule}
OBJECTIVES = ("elbo", "masked_ce")
# First numbers of the seeds of the evaluation masks, like those of sampler.py.
SHIFT_STREAM, MASK_STREAM = 3, 4
# Numbers of rows (B,) -> their conditions (B, S) int64
Conditions = Callable[[np.ndarray], np.ndarray]


def maskable(tokens: Tensor) -> Tensor:
    """(B, L) bool: the positions that hold text (or already [MASK])."""
    return (tokens > EOS) | (tokens == MASK)


# ---- loss ----------------------------------------------------------------------------------------

@dataclass
class Corrupted:
    """A batch with some tokens hidden. All (B, L) but `mask_ratio`, (B,), and `condition`."""

    tokens: Tensor  # int64, the clean ones
    noisy: Tensor  # int64, with [MASK]
    masked: Tensor  # bool
    weight: Tensor  # float32: the loss is the sum over masked positions of weight * -log p
    mask_ratio: Tensor  # float32, m(t)
    condition: Tensor | None = None  # (B, S) int64; [PAD] alone in a row without one

    def __getitem__(self, rows) -> "Corrupted":
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device) -> "Corrupted":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, do: Callable[[Tensor], Tensor]) -> "Corrupted":
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return Corrupted(*(None if x is None else do(x) for x in values))

    def hidden(self, model: nn.Module) -> Tensor:
        """(M, D): what the model makes of the M masked positions."""
        context = () if self.condition is None else (model.encode(self.condition),)
        return model.hidden(self.noisy, self.mask_ratio, *context)[self.masked]


class DiscreteDiffusion:
    """Corruption, training loss, likelihood bound and sampling for one schedule and objective."""

    kind = "diffusion"

    def __init__(self, schedule: str = "linear", objective: str = "masked_ce"):
        require(schedule in SCHEDULES, f"schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
        require(objective in OBJECTIVES, f"objective {objective!r}: choose "
                                         f"{' or '.join(OBJECTIVES)}")
        self.schedule, self.objective = SCHEDULES[schedule](), objective

    def times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) float64 times in (0, 1], one in each of `count` equal intervals, shuffled.

        Stratifying over the whole batch lowers the variance of the loss (arXiv 2107.00630, I.1).
        """
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        return 1 - (torch.randperm(count, generator=generator) + u) / count

    def corrupt(self, tokens: Tensor, t: Tensor, generator: torch.Generator | None = None,
                ) -> Corrupted:
        """Hides tokens of `tokens` (B, L) at times `t` (B,), at least one in every row.

        Runs on the CPU, where a seed means the same on every machine. With n maskable tokens a row
        has none hidden with probability (1 - m)^n; such a draw teaches nothing. So the mask is
        drawn given that it is not empty, and the weight of the row multiplied by
        P(not empty) = 1 - (1 - m)^n, which leaves the expected loss as it was.
        """
        can = maskable(tokens)  # (B, L)
        n = can.sum(1)  # (B,)
        require(bool((n > 0).all()), "a row without any text cannot be masked")
        m = self.schedule.mask_ratio(t.double())  # (B,)
        # 1. One uniform for every position; position i is hidden if u_i < m.
        u = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
        u = u.masked_fill(~can, 2.0)  # (B, L)
        # 2. Condition on the smallest uniform lying below m. Its distribution function is
        #    1 - (1 - u)^n; v is its quantile, which is shrunk to the part below m. Given the
        #    smallest, the others are uniform above it, so they are moved along.
        low, first = u.min(1)
        v = -torch.expm1(n * torch.log1p(-low))
        not_empty = -torch.expm1(n * torch.log1p(-m))
        new_low = -torch.expm1(torch.log1p(-v * not_empty) / n)
        u = new_low[:, None] + (u - low[:, None]) * ((1 - new_low) / (1 - low))[:, None]
        masked = can & (u < m[:, None])
        masked[torch.arange(len(tokens)), first] = True  # also where rounding put u at m
        # 3. Weights, so that the loss is a sum that may be split over micro-batches and ranks.
        if self.objective == "elbo":  # m'/m on sums, arXiv 2406.07524 eq. 10, per token of text
            row_weight = not_empty * self.schedule.rate(t.double()) / m / n.sum()
        else:
            row_weight = torch.full_like(m, 1 / float(masked.sum()))
        return Corrupted(tokens, tokens.masked_fill(masked, MASK), masked,
                         (row_weight[:, None] * masked).float(), m.float())

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """`corrupt` at stratified `times`."""
        return self.corrupt(tokens, self.times(len(tokens), generator), generator)

    def loss(self, model: nn.Module, tokens: Tensor | Corrupted,
             generator: torch.Generator | None = None) -> Tensor:
        """The training loss, a differentiable scalar in nats/token.

        `tokens` (B, L) are corrupted here at stratified times (noise of `generator`, by default
        torch's global one); a part of an already corrupted batch gives its share of the loss.
        """
        if isinstance(tokens, Tensor):
            tokens = self.corrupt_batch(tokens, generator)
        return weighted_loss(model, tokens)

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0,
              draws: int = 1, numbers: Iterable[np.ndarray] | None = None,
              conditions: "Conditions | None" = None) -> "Nelbo":
        """The exact any-order bound, stratified over the number of hidden tokens.

        For a row of n tokens NELBO = n E_k[mean over the k hidden of -log p], k uniform on 1..n:
        the mean over all orders in which the tokens could be uncovered (arXiv 2110.02037, arXiv
        2406.03736). It does not depend on the schedule.

        Args:
            batches: (B, L) int64 each.
            numbers: the numbers of the rows of each batch, by default 0, 1, ... Masks depend on
                (seed, number, draw) alone, so batching changes nothing.
            conditions: gives the conditions (B, S) of the rows with these numbers.
        """
        def hide(clean: Tensor, rows: np.ndarray) -> Iterator[tuple[Corrupted, Tensor]]:
            for draw in range(draws):
                masked, k, n = stratified_masks(clean, rows, draw, draws, seed)
                yield Corrupted(clean, clean.masked_fill(masked, MASK), masked, masked.float(),
                                (k / n).float()), k

        return measure_nats(model, batches, hide, numbers, conditions)

    def extra_nats(self, meta: dict, rows: Iterable[np.ndarray]) -> float:
        """What a text's code needs besides the tokens: the kind and length of every row."""
        return length_nats(meta, rows)

    def unmask(self, model: nn.Module, tokens: np.ndarray, sampler: Sampler, seed: int = 0,
               rows: Sequence[int] | None = None, conditions: np.ndarray | None = None,
               ) -> Iterator[State]:
        """`sampler.unmask` with this model: fills every [MASK] of `tokens` (B, L), step by step.

        `conditions` (N, S) belong to the rows with the numbers 0 to N - 1.
        """
        return unmask(numpy_step(model, sampler, conditions), tokens, sampler, seed, rows)


def weighted_loss(model: nn.Module, batch: Corrupted) -> Tensor:
    """The sum over masked positions of weight * -log p, a differentiable scalar.

    The vocabulary head runs on these M positions and nowhere else.
    """
    return model.loss(batch.hidden(model), batch.tokens[batch.masked], batch.weight[batch.masked])


def measure_nats(model: nn.Module, batches: Iterable[np.ndarray],
                 hide: Callable[[Tensor, np.ndarray], Iterable[tuple[Corrupted, Tensor]]],
                 numbers: Iterable[np.ndarray] | None = None,
                 conditions: "Conditions | None" = None) -> "Nelbo":
    """The nats of what `hide` hides in every batch (B, L), in evaluation mode.

    `hide(clean, rows)` gives batches with hidden tokens, and the k (B,) of each; `numbers` are the
    numbers of the rows of each batch, by default 0, 1, ..., and `conditions` gives theirs.
    """
    columns, seen = [], 0
    training, device = model.training, device_of(model)
    model.eval()
    numbers = iter(numbers) if numbers is not None else None
    with torch.no_grad():
        for batch in batches:
            clean = torch.as_tensor(batch)
            rows = next(numbers) if numbers else seen + np.arange(len(clean))
            seen += len(clean)
            n = maskable(clean).sum(1).numpy()
            told = None if conditions is None else torch.from_numpy(conditions(rows))
            for hidden, k in hide(clean, rows):
                hidden.condition = told
                columns.append((rows, n, k.numpy(), *row_sums(model, hidden, device)))
    model.train(training)
    return Nelbo(*map(np.concatenate, zip(*columns, strict=True)))


def row_sums(model: nn.Module, batch: Corrupted, device: torch.device,
             ) -> tuple[np.ndarray, np.ndarray]:
    """For each row (B,): the sum of -log p over its hidden tokens, and how many were likeliest."""
    there = batch.to(device)
    values = model.scores(there.hidden(model), there.tokens[there.masked])
    owner = batch.masked.nonzero()[:, 0].numpy()  # (M,) the row of each hidden token
    nats, correct = (np.bincount(owner, x.cpu().double().numpy(), minlength=len(batch.tokens))
                     for x in values)
    return nats, correct


def stratified_masks(clean: Tensor, rows: np.ndarray, draw: int, draws: int, seed: int,
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (B, L) that hide k of n tokens, with k stratified over 1..n; and k and n, (B,).

    The quantiles of k follow a randomly shifted golden-ratio sequence: spread evenly over any run
    of rows, uniform for each.
    """
    can = maskable(clean).numpy()
    n = can.sum(1)
    shift = np.random.default_rng([SHIFT_STREAM, seed]).random()
    quantile = (shift + (rows * draws + draw) * ((5 ** 0.5 - 1) / 2)) % 1  # (B,) in [0, 1)
    k = np.floor(quantile * n).astype(np.int64) + 1
    masked = np.zeros_like(can)
    for i, row in enumerate(rows):
        rng = np.random.default_rng([MASK_STREAM, seed, row, draw])
        masked[i, rng.permutation(np.flatnonzero(can[i]))[:k[i]]] = True
    return torch.from_numpy(masked), torch.from_numpy(k), torch.from_numpy(n)


@dataclass
class Nelbo:
    """What `DiscreteDiffusion.nelbo` measured, an entry for each row and draw: (N * draws,)."""

    row: np.ndarray  # number of the row
    n: np.ndarray  # tokens of text in the row
    k: np.ndarray  # how many of them were hidden
    nats: np.ndarray  # sum over the hidden of -log p
    correct: np.ndarray  # how many of the hidden were the likeliest token

    def row_nats(self) -> tuple[np.ndarray, np.ndarray]:
        """The bound of every row in nats, and its tokens, both (N,)."""
        _, index, draws = np.unique(self.row, return_inverse=True, return_counts=True)
        return (np.bincount(index, weights=self.n * self.nats / self.k) / draws,
                np.bincount(index, weights=self.n) / draws)

    @property
    def total_nats(self) -> float:
        return float(self.row_nats()[0].sum())

    @property
    def nats_per_token(self) -> float:
        nats, tokens = self.row_nats()
        return float(nats.sum() / tokens.sum())

    @property
    def standard_error(self) -> float:
        """Of nats_per_token, a ratio of sums over rows (delta method); 0 for a single row."""
        return ratio_error(*self.row_nats())

    @property
    def masked_ce(self) -> float:
        """The plain mean of -log p over all hidden tokens, what "masked_ce" trains on."""
        return float(self.nats.sum() / self.k.sum())

    @property
    def masked_accuracy(self) -> float:
        """Share of all hidden tokens that were the likeliest."""
        return float(self.correct.sum() / self.k.sum())

    def bits_per_byte(self, length_nats: float, text_bytes: int) -> float:
        """The bound on the text in bits/byte, with what telling the row lengths costs."""
        return (self.total_nats + length_nats) / math.log(2) / text_bytes

    def curve(self, bins: int = 20) -> list[dict]:
        """Masked cross-entropy and accuracy in equal bins of the mask ratio k/n.

        Bins that no draw fell into are left out.
        """
        which = np.ceil(self.k / self.n * bins).astype(int) - 1  # bin j holds (j/bins, (j+1)/bins]
        rows = []
        for j in np.unique(which):
            k, nats, correct = (x[which == j].sum() for x in (self.k, self.nats, self.correct))
            rows.append({"low": float(j / bins), "high": float((j + 1) / bins), "hidden": int(k),
                         "cross_entropy": float(nats / k), "accuracy": float(correct / k)})
        return rows

    def averages(self, bins: int = 20) -> dict[str, dict[str, float]]:
        """Averages over t of the curve for four mask ratios r(t).

        Each bin of the mask ratio counts with the share of t in [0, 1] that r(t) spends in it. A
        single "validation loss" of a masked model means nothing without this protocol.
        """
        curve = self.curve(bins)
        low, high, cross_entropy, accuracy = (
            np.array([point[key] for point in curve])
            for key in ("low", "high", "cross_entropy", "accuracy"))
        result = {}
        for name, time in INVERSE_RATIOS.items():
            share = time(high) - time(low)
            share /= share.sum()
            result[name] = {"cross_entropy": float((share * cross_entropy).sum()),
                            "accuracy": float((share * accuracy).sum())}
        return result


def ratio_error(nats: np.ndarray, tokens: np.ndarray) -> float:
    """The standard error of sum(nats) / sum(tokens) over rows (N,), by the delta method."""
    residual = nats - nats.sum() / tokens.sum() * tokens
    count = len(nats)
    return float(math.sqrt(count / max(1, count - 1) * (residual ** 2).sum()) / tokens.sum())


# t as a function of the mask ratio r, for what published "validation losses" average over
INVERSE_RATIOS = {
    "t": lambda r: r,
    "1-cos(pi t/2)": lambda r: 2 / np.pi * np.arccos(1 - r),
    "sin(pi t/2)^2": lambda r: 2 / np.pi * np.arcsin(np.sqrt(r)),
    "sin(pi t/2)": lambda r: 2 / np.pi * np.arcsin(r),
}


# ---- unmasking -----------------------------------------------------------------------------------

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
                ) -> tuple[Tensor, Tensor]:
        """
        Args:
            tokens: (B, L) int64, hidden ones are [MASK].
            count: (B,) int64, how many to uncover in each row; an adaptive pace may take more.
            temperature: () float32; 0 is greedy.
            noise: (B, 2, L) uniforms in [0, 1): for the order, for the token.
            most_hidden, most_count: at least the largest number hidden and of `count` in the batch.
                Plain numbers, for they are shapes; a graph of fixed shape has both at L.
            context: of the conditions of these rows, from the model's `encode`.
        Returns: the new tokens (B, L), and confidence (B, L) float32: the probability, at
            temperature 1, of each token drawn now, 0 elsewhere.
        """
        sampler = self.sampler
        masked = tokens == MASK  # (B, L)
        ratio = masked.sum(1) / maskable(tokens).sum(1).clamp(min=1)
        adaptive = sampler.pace in ADAPTIVE_PACES
        # 1. Score the hidden positions, the best first, and choose `count` of every row, or more
        #    where the pace finds the network sure of them.
        if sampler.order == "random" and not adaptive:
            positions = best_first(noise[:, 0].masked_fill(~masked, -1), most_count)  # (B, C)
            logits = self.logits(tokens, positions, ratio, context)  # (B, C, V)
            sure = None
        else:
            candidates = best_first(masked.int(), most_hidden)  # (B, M)
            every = self.logits(tokens, candidates, ratio, context)  # (B, M, V)
            score = (noise[:, 0].gather(1, candidates) if sampler.order == "random"
                     else SCORES[sampler.order](every))  # (B, M)
            score = score.masked_fill(~masked.gather(1, candidates), -math.inf)
            chosen = best_first(score, most_hidden if adaptive else most_count)  # (B, C)
            positions, logits = candidates.gather(1, chosen), take(every, chosen)
            sure = self.sure(logits) if adaptive else None
        wanted = torch.arange(positions.shape[1], device=tokens.device) < count[:, None]  # (B, C)
        if sure is not None:
            wanted = (wanted | sure) & masked.gather(1, positions)
            if not torch.compiler.is_exporting():  # a graph's shapes are fixed; else draw no more
                places = torch.arange(wanted.shape[1], device=tokens.device)
                needed = int((wanted.any(0) * places).max()) + 1
                positions, logits, wanted = (x[:, :needed] for x in (positions, logits, wanted))
        # 2. Draw their tokens and write them where the row still has some to uncover.
        drawn = draw(logits, noise[:, 1].gather(1, positions), temperature, sampler.top_k,
                     sampler.top_p)
        probability = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]  # (B, C)
        drawn = torch.where(wanted, drawn, tokens.gather(1, positions))
        new = tokens.scatter(1, positions, drawn)
        confidence = torch.zeros_like(tokens, dtype=torch.float32)
        return new, confidence.scatter(1, positions, probability * wanted)

    def logits(self, tokens: Tensor, positions: Tensor, ratio: Tensor, context: Context | None,
               ) -> Tensor:
        """FP32 logits (B, C, V) at positions (B, C): with the condition, without it, or for
        guidance of both."""
        guidance = self.sampler.guidance
        contexts = ([None] if context is None or guidance == 0 else
                    [context] if guidance == 1 else [context, None])
        first, *second = (self.model.head(self.model.hidden(
            tokens, ratio, context=told, at=positions)).float() for told in contexts)
        # The head's FP16 stand-in for -inf must not survive a high temperature.
        never = first <= -1e4
        if second:
            first = second[0] + guidance * (first - second[0])
        return first.masked_fill(never, -math.inf)

    def sure(self, logits: Tensor) -> Tensor:
        """Which of the positions, the best first, an adaptive pace uncovers: (B, C) bool.

        "entropy_bound" takes the longest beginning with sum H - max H <= gamma. H is the entropy of
        a position: that bounds, in nats, by how much their joint distribution can differ from the
        product of their own (EB-Sampler, arXiv 2505.24857).
        """
        if self.sampler.pace == "threshold":
            return confidence_score(logits) >= self.sampler.threshold
        entropy = -entropy_score(logits)
        return entropy.cumsum(1) - entropy.cummax(1).values <= self.sampler.gamma


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


SCORES = {"confidence": confidence_score, "margin": margin_score, "entropy": entropy_score}


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


def numpy_step(model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None) -> Step:
    """The torch step of this model and sampler, for the NumPy loop of sampler.py.

    `conditions` (N, S) int64 belong to the rows with the numbers 0 to N - 1; one of [PAD] alone is
    none.
    """
    sampler.check()
    step = UnmaskStep(model, sampler)
    device = device_of(model)
    temperature = torch.tensor(sampler.temperature, dtype=torch.float32, device=device)
    # On MPS the uniforms are coarser; the distribution function is in FP64 everywhere.
    precision = torch.float32 if device.type == "mps" else torch.float64
    kept = None if conditions is None else Kept(lambda row: model.encode(
        torch.from_numpy(conditions[row:row + 1]).to(device)))

    @torch.no_grad()  # (FSDP does not know inference mode)
    def run(tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray):
        most_hidden = int((tokens == MASK).sum(1).max())
        context = None if kept is None or sampler.guidance == 0 else together(kept.of(rows))
        new, confidence = step(
            torch.from_numpy(tokens).to(device), torch.from_numpy(count).to(device), temperature,
            torch.from_numpy(noise).to(precision).to(device), most_hidden, int(count.max()),
            context)
        return new.cpu().numpy(), confidence.cpu().numpy()

    return run


def numpy_choice(model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
                 ) -> Choice:
    """Draws one token of every row among those allowed at its place, for sampler.draw_limited.

    From the distribution that `numpy_step` would draw from, restricted to the allowed tokens and
    renormalised; temperature, top_k and top_p then apply to what is left. The probability is that
    of the drawn token among the allowed ones, at temperature 1.
    """
    sampler.check()
    step, device = UnmaskStep(model, sampler), device_of(model)
    temperature = torch.tensor(sampler.temperature, dtype=torch.float32, device=device)
    precision = torch.float32 if device.type == "mps" else torch.float64
    kept = None if conditions is None else Kept(lambda row: model.encode(
        torch.from_numpy(conditions[row:row + 1]).to(device)))

    @torch.no_grad()
    def run(tokens: np.ndarray, place: np.ndarray, allowed: np.ndarray, uniform: np.ndarray,
            rows: np.ndarray):
        context = None if kept is None or sampler.guidance == 0 else together(kept.of(rows))
        there = torch.from_numpy(tokens).to(device)
        ratio = (there == MASK).sum(1) / maskable(there).sum(1)
        logits = step.logits(there, torch.from_numpy(place).to(device)[:, None], ratio, context)
        logits = logits[:, 0].masked_fill(~torch.from_numpy(allowed).to(device), -math.inf)
        drawn = draw(logits, torch.from_numpy(uniform).to(precision).to(device), temperature,
                     sampler.top_k, sampler.top_p)  # (B,)
        probability = logits.softmax(-1).gather(-1, drawn[:, None])[:, 0]
        return drawn.cpu().numpy(), probability.cpu().numpy()

    return run
