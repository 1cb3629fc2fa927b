"""Low-rank adapters: small matrices beside large ones, which stay as they are (LoRA, arXiv
2106.09685). A library of model.py and of whatever merges them.

    model = create_model("small", lora_rank=8, lora_alpha=16.0, lora_targets="query,value")
    merge(model)      # into the weights: as fast as without
    unmerge(model)    # and out again

The adapters of a model are part of its settings (`ModelConfig`), so that a checkpoint says which it
has; kinds/adapters.py writes them into a file of their own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from network.layers import Linear, ModelConfig
from network.transformer import Block

PART = ".lora."  # in the names of their parameters


class LoRA(nn.Module):
    """alpha / rank * B A x (arXiv 2106.09685, eq. 3): B begins at zero, so that at first nothing is
    added, to the bit."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.down = Linear(inputs, rank)  # A
        self.up = Linear(rank, outputs, std=0.0)  # B

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale

    def product(self) -> Tensor:
        """(outputs, inputs) FP32: what it adds to the matrix."""
        return self.scale * (self.up.weight.float() @ self.down.weight.float())


def add_adapters(blocks: list[Block], config: ModelConfig) -> None:
    """Gives the matrices that `config` names in each block an adapter; nothing else changes, nor do
    the random numbers that are drawn after it."""
    if not config.lora_rank:
        return
    state = torch.random.get_rng_state()
    for block in blocks:
        for name in config.adapted:
            linear = getattr(block.attention, name, None) or getattr(block, name)
            linear.lora = LoRA(linear.in_features, linear.out_features, config.lora_rank,
                               config.lora_alpha)
    torch.random.set_rng_state(state)


def adapted(model: nn.Module) -> Iterator[Linear]:
    for module in model.modules():
        if isinstance(module, Linear) and module.lora is not None:
            yield module


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds the adapters' products to their matrices and takes the adapters off, which are kept for
    `unmerge`. In FP32 each weight is rounded once: what a map makes of an input differs by rounding
    alone."""
    for linear in list(adapted(model)):
        linear.weight += linear.lora.product().to(linear.weight.dtype)
        linear.__dict__["merged"], linear.lora = linear.lora, None
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Takes them out again: each weight is what it was, but for two roundings in FP32."""
    for linear in model.modules():
        if isinstance(linear, Linear) and (lora := linear.__dict__.pop("merged", None)) is not None:
            linear.weight -= lora.product().to(linear.weight)
            linear.lora = lora
    return model
