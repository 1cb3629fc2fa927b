"""What a kind of model is. A library of diffusion.py and of the other kinds.

One object per kind answers whatever differs between them: which network, which loss, which
likelihood, how stories are written, and what a run and a checkpoint say of it. A new kind is a
class of its own with an entry in registry.py; train.py, evaluate.py and generate.py then know it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kinds.likelihood import ConditionsOf, Corrupted, Nelbo, weighted_loss
from model import DiffusionTransformer, size_of
from network.layers import ModelConfig
from network.transformer import check_size
from sampling.left_to_right import Reader
from sampling.loop import Choice, Step
from sampling.rows import draw_length
from sampling.sampler import GAP, Sampler

# The settings of a run that shape its network. A later stage takes them from the model that it
# starts from.
NETWORK_SETTINGS = ("model_config", "qk_norm", "neighbour_init", "time_conditioning", "tied_head",
                    "mlp", "value_residual", "head_gates", "self_conditioning")


class Kind:
    """One kind of model, with the settings of its loss."""

    name: ClassVar[str]  # in checkpoints
    title: ClassVar[str] = "model"  # in messages
    objectives: ClassVar[tuple[str, ...]]  # the values of --objective that train it
    stages: ClassVar[tuple[int, ...]] = (1,)  # and those of --stage
    network: ClassVar[type[DiffusionTransformer]] = DiffusionTransformer
    causal: ClassVar[bool] = False  # each token sees those before it, alone
    exact: ClassVar[bool] = False  # whether `nelbo` is the likelihood itself, not a bound
    unmasks: ClassVar[bool] = True  # fills whatever is hidden, in any order: generate.py, exports
    from_left: ClassVar[bool] = False  # can write from the left and end its stories: `reader`
    conditional: ClassVar[bool] = False  # attends to a condition
    init_kinds: ClassVar[tuple[str, ...] | None] = None  # what --init_from may name; None: any
    keeps_settings: ClassVar[tuple[str, ...]] = ()  # of the run that --init_from names
    own: ClassVar[frozenset[str]] = frozenset()  # flags of train.py that are for this kind alone
    first_passes: ClassVar[bool] = True  # with self-conditioning, in training
    gap: ClassVar[dict[str, Any]] = GAP  # the settings of a Sampler that fills a gap best
    of_text: ClassVar[bool] = True  # whether `nelbo` is of a text, so that bits/byte mean something
    unused: ClassVar[frozenset[str]] = frozenset()  # flags of train.py that change nothing,
    unused_for: ClassVar[str] = "without effect for this kind of model"  # and why

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways in which one network of this kind measures and writes; none: in one."""
        return ()

    def in_mode(self, mode: str) -> "Kind":
        """This kind as it measures and writes in one of its modes."""
        raise NotImplementedError

    @classmethod
    def of_run(cls, config: Any) -> "Kind":
        """That of a run with these settings (a TrainConfig)."""
        return cls()

    @classmethod
    def of_checkpoint(cls, checkpoint: dict) -> "Kind":
        """That of a checkpoint, whose settings it may need."""
        return cls()

    # ---- network ---------------------------------------------------------------------------------

    def starts_from(self, stage: int) -> tuple[str, ...]:
        """The kinds of model that this stage can start from; none where it starts from nothing."""
        return ()

    def create(self, config: Any, meta: dict, source: dict | None = None, resumed: bool = False,
               ) -> DiffusionTransformer:
        """The network of a run with these settings (a TrainConfig) and data (its meta.json).

        `source` is the checkpoint that it starts from, if it does; with `resumed` it is that of the
        run itself, whose weights are put in later.
        """
        size, *others = NETWORK_SETTINGS
        return self.network(size_of(
            getattr(config, size), vocab_size=meta["vocab_size"], max_len=meta["seq_len"],
            causal=self.causal, dropout=config.dropout, **self.network_settings(config),
            **{name: getattr(config, name) for name in others}))

    def network_settings(self, config: Any) -> dict[str, Any]:
        """Fields of the ModelConfig that only this kind has."""
        return {}

    @classmethod
    def restore(cls, checkpoint: dict, weights: dict[str, Tensor]) -> DiffusionTransformer:
        """The network of a checkpoint, made for these weights, which are put in later. Raises
        KeyError, TypeError or RuntimeError for settings that do not belong to them."""
        config = ModelConfig(**checkpoint["model_config"])
        check_size(config, weights)
        return cls.network(config)

    def trained(self, stage: int) -> Callable[[str], bool]:
        """Which parameters this stage trains, by their names."""
        return lambda name: True

    # ---- training --------------------------------------------------------------------------------

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """What the network is given and asked of rows (B, L), and the weights of the loss."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Corrupted) -> Tensor:
        """The loss of a batch, or a part's share of it: a differentiable scalar in nats/token."""
        return weighted_loss(model, batch)

    # ---- likelihood ------------------------------------------------------------------------------

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0, draws: int = 1,
              numbers: Iterable[np.ndarray] | None = None, conditions: ConditionsOf | None = None,
              ) -> Nelbo:
        """-log p of the rows of batches (B, L) int64, or a bound of it.

        Args:
            seed, draws: of masks, where there are any.
            numbers: the numbers of the rows of each batch, by default 0, 1, ... Masks depend on
                (seed, number, draw) alone, so batching changes nothing.
            conditions: gives the conditions of the rows with these numbers.
        """
        raise NotImplementedError

    def extra_nats(self, meta: dict, rows: Iterable[np.ndarray]) -> float:
        """What a text's code needs besides the tokens."""
        raise NotImplementedError

    def gap_nats(self, model: nn.Module, row: np.ndarray, gap: np.ndarray,
                 left_share: float = 0.0) -> float:
        """Nats of those tokens of `row` (L,) that are [MASK] in `gap`, given all that the network
        sees of the others, and those of them to the left. `left_share` is the Sampler's."""
        raise NotImplementedError

    @property
    def likelihood_name(self) -> str:
        return "NLL" if self.exact else "NELBO"

    def protocol(self, draws: int) -> str:
        """How `nelbo` measures, in words."""
        raise NotImplementedError

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, model: nn.Module, lengths: Sequence[int], sampler: Sampler, seed: int = 0,
              conditions: np.ndarray | None = None) -> list[np.ndarray]:
        """A story of each of these numbers of tokens (unless the kind ends them itself) as a row
        [BOS] text [EOS]; `conditions` are one for each."""
        raise NotImplementedError

    def fill(self, model: nn.Module, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
             ) -> list[np.ndarray]:
        """The rows with something in the place of every [MASK]."""
        raise NotImplementedError

    def step(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
             ) -> Step:
        """One step of the loop in sampling/, of a kind that unmasks; `conditions` belong to the
        rows with the numbers 0, 1, ..."""
        raise NotImplementedError

    def choice(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
               ) -> Choice:
        """Draws one place among some tokens, for the same loop."""
        raise NotImplementedError

    def reader(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
               ) -> Reader:
        """The model behind a cache, for the writers of sampling/left_to_right.py, of a kind that
        writes from the left; `conditions` belong to the rows with the numbers 0, 1, ..."""
        raise NotImplementedError

    def describe(self, sampler: Sampler, seed: int) -> str:
        """The settings that `write` goes by, in words."""
        return f"temperature {sampler.temperature:g}, seed {seed}"


def drawn_lengths(histogram: dict, count: int, seed: int, longest: int) -> list[int]:
    """Numbers of tokens for `count` stories, from the length histogram of meta.json; rows hold at
    most `longest`, [BOS] and [EOS] included."""
    return [draw_length(histogram, seed, i) or longest - 2 for i in range(count)]


def averaged(checkpoint: dict) -> dict[str, Tensor]:
    """The averaged (EMA) weights of a checkpoint, or its weights where it has no others."""
    return checkpoint["weights"] if checkpoint.get("ema") is None else checkpoint["ema"]
