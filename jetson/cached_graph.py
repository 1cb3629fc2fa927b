"""A pass behind a cache of what is finished, as a graph for ONNX and TensorRT. A library of
graphs.py.

One graph is both passes of a model that writes from the left: what a token sees, before it alone or
its whole block, is an input. How tokens are drawn is not in it (sampling/drawing.py): a pass is of
few tokens, so that their logits are small.
"""

import torch
from torch import Tensor, nn

from corpus.tokens import BOS, MASK
from model import DiffusionTransformer
from network.attention import HIDDEN
from network.layers import CARRIED
from network.transformer import Known

EXAMPLE_TOKENS = 3  # of the export


class CachedPass(nn.Module):
    """N tokens of every row, which see each other and S slots of a cache, as `mask` says."""

    def __init__(self, model: DiffusionTransformer):
        super().__init__()
        self.model = model
        never = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        never[[MASK, BOS]] = True  # [EOS] and [PAD] can be predicted, or not: the host knows
        self.register_buffer("never", never, persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, keys: Tensor,
                values: Tensor, carried: Tensor | None = None,
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            tokens, positions: (B, N) int32; what stands before a row is at -1.
            mask: (B, 1, N, S + N) float32, 0 or HIDDEN, for the slots and then for the tokens.
            keys, values: (layers, B, H, S, D/H) in the compute precision; finite in every slot.
            carried: (B, N, 2K) float32, of a model with self-conditioning: what an earlier pass
                expected of these tokens; zeros for nothing.
        Returns: logits (B, N, V) and hidden states (B, N, D) in float32, and the tokens' own keys
            and values (layers, B, H, N, D/H) in the compute precision.
        """
        kept: Known = []
        view = self.model.view(positions, mask.to(self.model.compute_dtype), causal=False)
        hidden = self.model.hidden(tokens.long(), view=view, kept=kept,
                                   known=list(zip(keys.unbind(), values.unbind(), strict=True)),
                                   carried=carried)
        logits = nn.functional.linear(hidden, self.model.vocabulary.weight).float()
        logits = torch.where(self.never, HIDDEN, logits)
        return logits, hidden.float(), *(torch.stack(part) for part in zip(*kept, strict=True))


def pass_inputs(model: DiffusionTransformer, batch: int, slots: int) -> dict[str, Tensor]:
    """Inputs of the shapes that the graph will have, but for N, which stays open."""
    config, count = model.config, EXAMPLE_TOKENS
    tokens = torch.full((batch, count), MASK, dtype=torch.int32)
    shape = (config.layers, batch, config.heads, slots, config.width // config.heads)
    keys = torch.zeros(shape, dtype=model.compute_dtype)
    inputs = dict(tokens=tokens, positions=torch.arange(count).expand(batch, -1).int(),
                  mask=torch.zeros(batch, 1, count, slots + count), keys=keys, values=keys.clone())
    if model.self_conditioning:
        inputs["carried"] = torch.zeros(batch, count, 2 * CARRIED)
    return inputs
