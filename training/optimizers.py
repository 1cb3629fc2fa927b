"""Muon, and which parameters it updates. A library: nothing to run here.

    optimizers = make_optimizers(model, "muon", lr=0.006, weight_decay=0.0, precision="bf16")
"""

import sys
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import DiffusionTransformer
from network.attention import Heads
from network.layers import PRECISIONS
from network.lora import PART as ADAPTER
from network.transformer import Block

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

OPTIMIZERS = ("muon", "adamw")
DEFAULT_LR = {"muon": 0.006, "adamw": 0.001}
BETAS = (0.9, 0.98)  # AdamW's: at these batch sizes 0.999 remembers too long
# Five steps of this polynomial bring singular values between about 0.01 and 1 to 0.7 .. 1.2
# (K. Jordan, kellerjordan.github.io/posts/muon, 2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(x: Tensor) -> Tensor:
    """U V^T of x = U S V^T, roughly, for matrices (N, rows, columns): all singular values near 1.

    By Newton-Schulz iteration, in the precision of `x`.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products are over the longer side
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (N, rows, rows)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


class Part(NamedTuple):
    """In which parts a matrix is orthogonalised: of so many rows, or columns, each."""

    dim: int  # 0: rows, 1: columns
    size: int


def in_parts(x: Tensor, part: Part | None) -> Tensor:
    """`orthogonalise` of every part of matrices (N, rows, columns)."""
    if part is None:
        return orthogonalise(x)
    cut = x if part.dim == 0 else x.mT
    count = cut.shape[1] // part.size
    parts = cut.unflatten(1, (count, part.size)).flatten(0, 1)  # (N * count, size, columns)
    whole = orthogonalise(parts).unflatten(0, (len(x), count)).flatten(1, 2)
    return whole if part.dim == 0 else whole.mT


MLP_PART = 128  # rows or columns, at least


def parts_of(block: Block) -> dict[nn.Parameter, Part]:
    """Attention's matrices are cut by heads, the MLP's into parts of hidden units: a map that is
    orthogonal as a whole costs four times as many operations and brings next to nothing
    (docs/experiments.md)."""
    parts = {}
    for heads in block.modules():
        if isinstance(heads, Heads):
            size = heads.query.out_features // heads.heads
            parts |= {linear.weight: Part(0, size)
                      for linear in (heads.query, heads.key, heads.value)}
            parts[heads.out.weight] = Part(1, size)
    hidden = block.up.out_features
    size = next(n for n in range(min(MLP_PART, hidden), hidden + 1) if hidden % n == 0)
    parts |= {linear.weight: Part(0, size) for linear in (block.up, block.gate) if linear}
    return parts | {block.down.weight: Part(1, size)}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix is updated alike (arXiv 2502.16982).

    The update has the root mean square 0.2 of AdamW's (eq. 4 there), so both share a learning rate.
    Matrices of one shape are orthogonalised together, those in `parts` part by part, in
    `precision`: "bf16" pays only where the hardware multiplies it, which torch.optim.Muon does not
    ask. Of several processes each works out
    its share of them for all, so that the same bits move the weights in every process.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 precision: str = "fp32", parts: dict[nn.Parameter, Part] | None = None):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.parts = parts or {}
        self.dtype = PRECISIONS[precision]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape, self.parts.get(p)].append(p)
            decayed = 1 - group["lr"] * group["weight_decay"]
            for (shape, part), params in shapes.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                torch._foreach_lerp_(self._momenta(params), [local(p.grad) for p in params],
                                     1 - group["momentum"])
                updates = self._updates(params, group["momentum"], part)
                sides = shape if part is None else (part.size, shape[1 - part.dim])
                scale = group["lr"] * 0.2 * max(sides) ** 0.5
                weights = [local(p) for p in params]
                torch._foreach_mul_(weights, decayed)
                torch._foreach_add_(weights, list(updates.to(weights[0].dtype)), alpha=-scale)

    def _momenta(self, params: list[nn.Parameter]) -> list[Tensor]:
        return [local(self.state[p]["momentum_buffer"]) for p in params]

    def _updates(self, params: list[nn.Parameter], momentum: float, part: Part | None) -> Tensor:
        """The orthogonalised directions of N matrices (rows, columns), (N, rows, columns); of
        matrices that are spread over the processes the rows that this one holds."""
        def directions(some: list[nn.Parameter]) -> Tensor:
            if not some:
                return params[0].new_empty((0, *params[0].shape), dtype=self.dtype)
            return torch.stack(torch._foreach_lerp(
                [local(p.grad) for p in some], self._momenta(some), momentum)).to(
                self.dtype)  # Nesterov's

        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return in_parts(directions(params), part)
        shares = [len(share) for share in torch.arange(len(params)).tensor_split(world)]
        if is_spread(params[0]):
            return orthogonalised_rows(directions(params), shares, params[0], part)
        first, own = sum(shares[:dist.get_rank()]), shares[dist.get_rank()]
        shape = params[0].shape
        mine = params[0].new_zeros((shares[0], *shape), dtype=self.dtype)
        mine[:own] = in_parts(directions(params[first:first + own]), part)
        gathered = [torch.empty_like(mine) for _ in shares]
        dist.all_gather(gathered, mine)
        return torch.cat([part[:share] for part, share in zip(gathered, shares, strict=True)])


def make_optimizers(model: DiffusionTransformer, name: str, lr: float, weight_decay: float,
                    precision: str) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all.

    Frozen parameters are left out; low-rank adapters are AdamW's. Weight decay is for the blocks'
    matrices. `precision` is what the model computes in; FP16 lacks the range for Muon, which then
    uses FP32.
    """
    matrices = [p for block in model.all_blocks for name, p in block.named_parameters()
                if p.ndim == 2 and p.requires_grad and ADAPTER not in name]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    if not matrices:
        return [torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0)]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=lr, betas=BETAS)]
    parts = {p: part for block in model.all_blocks for p, part in parts_of(block).items()}
    return [Muon(matrices, lr, weight_decay, precision="bf16" if precision == "bf16" else "fp32",
                 parts=parts),
            torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0)]


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, for the averaged (EMA) weights."""
    torch._foreach_lerp_([local(p) for p in average.parameters()],
                         [local(p) for p in model.parameters()], 1 - decay)


# ---- parameters that FSDP has spread over the processes ------------------------------------------

def is_spread(x: object) -> bool:
    """Whether it is a DTensor. Only FSDP makes them: where nobody has read their module, which
    takes half a second, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor) -> Tensor:
    """The whole tensor of which every process holds a part (a collective call), or `x` itself."""
    return x.full_tensor() if is_spread(x) else x


def local(x: Tensor) -> Tensor:
    """The part of it that this process holds."""
    return x.to_local() if is_spread(x) else x


def orthogonalised_rows(rows: Tensor, shares: list[int], like: "DTensor",
                        part: Part | None = None) -> Tensor:
    """Orthogonalises matrices of which every process holds some rows, (N, own rows, columns), and
    gives those rows of the result.

    Every process is sent its share of the matrices whole (the first `shares[0]`, the next
    `shares[1]`, ...), and sends their rows back: half as much of each as if all had all.
    """
    group, (count, own, columns) = like.device_mesh.get_group(), rows.shape
    chunk = -(-like.shape[0] // len(shares))  # as FSDP deals out the rows, the last ones fewer
    held = [max(0, min(chunk, like.shape[0] - rank * chunk)) for rank in range(len(shares))]
    mine = shares[dist.get_rank(group)]
    by_owner = [share * own * columns for share in shares]
    by_holder = [mine * some * columns for some in held]
    received = rows.new_empty(sum(by_holder))
    dist.all_to_all_single(received, rows.flatten(), by_holder, by_owner, group=group)
    whole_ones = torch.cat([sent.view(mine, some, columns) for sent, some in zip(
        received.split(by_holder), held, strict=True)], dim=1)  # (mine, rows, columns)
    update = in_parts(whole_ones, part)
    sent = torch.cat([some.flatten() for some in update.split(held, dim=1)])
    returned = rows.new_empty(count * own * columns)
    dist.all_to_all_single(returned, sent, by_owner, by_holder, group=group)
    return returned.view(count, own, columns)
