"""What reads a condition for the blocks of a denoiser. A library of model.py."""

from torch import Tensor

from network.transformer import Transformer


class TextEncoder(Transformer):
    """Reads a condition, in both directions."""

    def forward(self, tokens: Tensor, bias: Tensor) -> list[Tensor]:
        """(B, S) token ids, [PAD] behind the text, and (B, 1, 1, S) for the attention scores ->
        (B, S, E) for each depth: what every block reads, and what the last one leaves."""
        states: list[Tensor] = []
        last = self.through_blocks(self.embed(tokens), bias, states=states)
        return [*states, last]
