"""A draft head in NumPy, for torch models and exported ones alike. What it computes, and why, is in
network/draft_head.py.
"""

from collections.abc import Mapping

import numpy as np

from corpus.tokens import EOS

MATRICES = ("read", "mix", "back", "tell", "before", "behind")


class DraftHead:
    """V ids, of which it drafts the first W; R is its rank, D the network's width."""

    def __init__(self, parts: Mapping[str, np.ndarray]):
        self.read, self.mix, self.back, self.tell, self.before, self.behind = (
            np.ascontiguousarray(parts[name], np.float32) for name in MATRICES)

    def start(self, hidden: np.ndarray) -> np.ndarray:
        """The state (B, R) behind tokens whose hidden states are (B, D)."""
        return hidden @ self.read.T

    def after(self, state: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The state (B, R) behind tokens (B,) that come next, and the logits (B, V) there."""
        size = np.sqrt((state * state).mean(-1, keepdims=True) + np.float32(1e-6))
        seen = np.concatenate([state / size, self.before[tokens]], -1)
        state = state + np.square(np.maximum(seen @ self.mix.T, 0)) @ self.back.T
        logits = np.full((len(state), len(self.before)), -np.inf, np.float32)
        logits[:, :len(self.behind)] = state @ self.behind.T
        logits[:, :EOS] = -np.inf
        return state, logits

    def told(self, tokens: np.ndarray) -> np.ndarray:
        """(B, V): what is to be added to the network's logits behind tokens (B,) that it did not
        see; of ids that are not drafted nothing."""
        more = np.zeros((len(tokens), len(self.before)), np.float32)
        more[:, :len(self.behind)] = self.before[tokens] @ self.tell.T @ self.behind.T
        return more
