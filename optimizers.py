"""Muon, and which parameters it updates. A library: nothing to run here.

    optimizers = make_optimizers(model, "muon", lr=0.006, weight_decay=0.0, precision="bf16")
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import PRECISIONS, DiffusionTransformer

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


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix is updated alike (arXiv 2502.16982).

    The update has the root mean square 0.2 of AdamW's (eq. 4 there), so both share a learning rate.
    Matrices of one shape are orthogonalised together, in `precision`: "bf16" pays only where the
    hardware multiplies it, which torch.optim.Muon does not ask.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 precision: str = "fp32"):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = PRECISIONS[precision]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                directions = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    direction = p.grad.lerp(buffer, group["momentum"])  # Nesterov's
                    directions.append(whole(direction).to(self.dtype))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(directions)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    local(p).add_(own_part(update, p).to(p.dtype), alpha=-scale)


def make_optimizers(model: DiffusionTransformer, name: str, lr: float, weight_decay: float,
                    precision: str) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all.

    Frozen parameters are left out. Weight decay is for the blocks' matrices. `precision` is what
    the model computes in; FP16 lacks the range for Muon, which then uses FP32.
    """
    matrices = [p for block in model.all_blocks for p in block.parameters()
                if p.ndim == 2 and p.requires_grad]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=lr, betas=BETAS)]
    return [Muon(matrices, lr, weight_decay, precision="bf16" if precision == "bf16" else "fp32"),
            torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0)]


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, for the averaged (EMA) weights."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        local(mean).lerp_(local(weight), 1 - decay)


# ---- parameters that FSDP has spread over the processes ------------------------------------------

def whole(x: Tensor) -> Tensor:
    """The whole tensor of which every process holds a part (a collective call), or `x` itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """The part of it that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def own_part(x: Tensor, like: nn.Parameter) -> Tensor:
    """Of a whole tensor the rows that this process holds of `like`."""
    if not isinstance(like, DTensor):
        return x
    parts = x.chunk(like.device_mesh.size())
    rank = like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else x[:0]
