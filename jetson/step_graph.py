"""The unmasking step as a graph of fixed shape, for ONNX and TensorRT. A library of graphs.py.

It computes what `sampling.step.UnmaskStep` does, in operators that TensorRT has: no FP64, no
search, no gather of chosen positions (every position is scored, for a graph's shapes are fixed),
and tokens drawn among the `LIKELIEST`. How to draw and in which order are inputs, so that one graph
serves every sampler that needs nothing but tokens and confidences.
"""

import torch
from torch import Tensor, nn

from corpus.tokens import BUCKET, MASK, PAD, maskable
from model import DiffusionTransformer
from network.attention import HIDDEN, Context
from network.layers import CARRIED
from sampling.sampler import ORDERS

LIKELIEST = 64  # tokens among which a graph draws, as the torch step does with --top_k 64
OPTIONS = ("temperature", "top_p", "top_k", "order", "threshold", "guidance")


class DeviceStep(nn.Module):
    """`sampling.step.UnmaskStep` with the sampler's settings as inputs. Logits leave it only for
    the exporter's report.

    A row may be longer than its story: what lies behind the story's own padding is hidden from the
    network, which sees the very row that the torch step gives it.
    """

    def __init__(self, model: DiffusionTransformer, guided: bool = False):
        super().__init__()
        self.model, self.guided = model, guided
        self.with_logits = False  # as a last output

    def forward(self, tokens: Tensor, count: Tensor, noise: Tensor, options: Tensor,
                *others: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            tokens: (B, L) int32, hidden ones are [MASK].
            count: (B,) int32, how many to uncover in each row.
            noise: (B, 2, L) float32 uniforms in [0, 1): for the order, for the token.
            options: (6,) float32, see OPTIONS; order is its number in ORDERS, and tokens at
                least as probable as `threshold` are uncovered beyond the count (2: none).
            others: of a model with self-conditioning what the step before expected, (B, L, 2K)
                float32, see `model.likeliest`; behind it keys, values and bias of the condition, of
                a model with one.
        Returns: the new tokens (B, L) int32, and confidence (B, L) float32: the probability of each
            token drawn now, at temperature 1; 0 elsewhere. With self-conditioning what is carried
            on, too; and `with_logits` the logits (B, L, V) float32.
        """
        carries = bool(self.model.self_conditioning)
        carried, context = others[:carries], others[carries:]
        temperature, top_p, top_k, order, threshold, guidance = options.unbind()
        tokens = tokens.long()
        masked = tokens == MASK  # (B, L)
        logits = self.logits(tokens, masked, context, guidance, *carried)  # (B, L, V)
        norm = logits.logsumexp(-1)  # (B, L)
        best, ids = logits.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)  # (B, L, 64)
        # 1. Which positions: those of the highest score, of equals the leftmost.
        largest = (best[..., 0] - norm).exp()  # probability of the likeliest token, (B, L)
        log_p = logits - norm[..., None]
        scores = dict(random=noise[:, 0], confidence=largest,
                      margin=largest - (best[..., 1] - norm).exp(),
                      entropy=(log_p.exp() * log_p).sum(-1),
                      left=-torch.arange(tokens.shape[1], device=tokens.device).float())
        score = sum(torch.where(order == i, scores[name], 0.0) for i, name in enumerate(ORDERS))
        score = torch.where(masked, score, HIDDEN)
        wanted = masked & ((rank(score) < count[:, None]) | (largest >= threshold))
        # 2. Which token: the distribution function over the likeliest, in the order of their ids,
        #    inverted at the uniform.
        place = torch.arange(best.shape[-1], device=tokens.device)
        scaled = (best - best[..., :1]) / temperature.clamp(min=1e-30)
        probability = torch.where(place < top_k, scaled, HIDDEN).softmax(-1)
        # Sums up to each token as products with a triangle: TensorRT has no other cumulative sum
        # but a loop.
        up_to = torch.ones(len(place), len(place), device=tokens.device).triu()
        before = probability @ up_to - probability
        probability = torch.where((before < top_p) | (top_p >= 1), probability, 0.0)
        by_id = (-ids.float()).topk(ids.shape[-1], dim=-1).indices
        probability, candidates = probability.gather(-1, by_id), ids.gather(-1, by_id)
        cumulative = probability @ up_to  # (B, L, 64)
        target = noise[:, 1, :, None] * cumulative[..., -1:]
        index = (cumulative <= target).sum(-1, keepdim=True)
        last = (cumulative < cumulative[..., -1:]).sum(-1, keepdim=True)  # of those it may draw
        drawn = candidates.gather(-1, torch.minimum(index, last))[..., 0]  # (B, L)
        drawn = torch.where(temperature > 0, drawn, ids[..., 0])
        chosen = logits.gather(-1, drawn[..., None])[..., 0]
        confidence = torch.where(wanted, (chosen - norm).exp(), 0.0)
        results = [torch.where(wanted, drawn, tokens).int(), confidence]
        if carries:
            expected = torch.cat([ids.float()[..., :CARRIED],
                                  (best - norm[..., None]).exp()[..., :CARRIED]], -1)
            results.append(torch.where((masked & ~wanted)[..., None], expected, 0.0))
        return (*results, logits) if self.with_logits else tuple(results)

    def logits(self, tokens: Tensor, masked: Tensor, context: tuple[Tensor, ...],
               guidance: Tensor, carried: Tensor | None = None) -> Tensor:
        """(B, L, V) float32."""
        ratio = masked.sum(1) / maskable(tokens).sum(1).clamp(min=1)
        length = (tokens != PAD).sum(1)
        width = (length / BUCKET).ceil() * BUCKET  # of the row as the torch step has it
        seen = torch.arange(tokens.shape[1], device=tokens.device) < width[:, None]  # (B, L)
        bias = torch.where(seen, 0.0, HIDDEN)[:, None, None].to(self.model.compute_dtype)
        condition = (Context(*(part.to(self.model.compute_dtype) for part in context)) if context
                     else None)
        view = self.model.view(tokens.shape[1], bias)
        logits = self.model.head(self.model.hidden(tokens, ratio, condition, view=view,
                                                   carried=carried)).float()
        if self.guided:
            plain = self.model.head(self.model.hidden(tokens, ratio, view=view,
                                                      carried=carried)).float()
            logits = plain + guidance * (logits - plain)
        return torch.where(self.model.impossible < 0, HIDDEN, logits)


def rank(score: Tensor) -> Tensor:
    """(B, L): how many positions of the row come before each, the highest score first."""
    place = torch.arange(score.shape[1], device=score.device)
    own, others = score[:, :, None], score[:, None, :]
    before = (others > own) | ((others == own) & (place[None, :] < place[:, None]))
    return before.sum(-1)
