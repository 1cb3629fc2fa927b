"""Several processes that train one model, started by torchrun. A library: nothing to run here.

    with start_processes("auto") as processes:      # one process, or all that torchrun started
        total, = processes.sum([value])

Every process works out the whole global batch and its masks (cheap, and the same everywhere, for
they depend on the seed and the step alone) and trains on every `world`-th row of it. So the times
are stratified over the global batch, and any number of processes takes the same steps as one.
"""

from cli import Stopped, UserError, describe, is_of_the_machine, require

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinds.kind import Kind
from kinds.likelihood import Corrupted, weighted_loss
from model import DiffusionTransformer
from network.hardware import pick_device
from training.optimizers import is_spread, whole

# How long a collective call may wait: rank 0 prepares data and writes checkpoints meanwhile.
PATIENCE = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among `world`; alone by default."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, values: list[float] | Tensor) -> list[float]:
        """Each value summed over all processes, in FP64; those of a tensor are read from their
        device once, after that."""
        if self.world == 1:
            return values.tolist() if isinstance(values, Tensor) else values
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        if self.world == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, work: Callable[[], None]) -> None:
        """Does `work` in the main process; its UserError is raised in all of them."""
        problem = None
        if self.main:
            try:
                work()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                if not is_of_the_machine(error):
                    raise
                problem = describe(error)
        problem = self.gather(problem)[0]
        require(problem is None, problem or "")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def own(self, items: list) -> list:
        """Every `world`-th item, the same number in every process: the last may come twice."""
        if not items:
            return []
        return [items[min(i + self.rank, len(items) - 1)]
                for i in range(0, len(items), self.world)]

    def own_rows(self, count: int, parts: int) -> Iterator[tuple[Tensor, float]]:
        """Numbers of this process's rows of a batch of `count`, in `parts` micro-batches, each with
        the factor of its loss.

        Every process must run the network equally often, so one without rows takes row 0 with
        factor 0. The others have `world`, for gradients are averaged over the processes.
        """
        for part in torch.arange(count)[self.rank::self.world].tensor_split(parts):
            if len(part):
                yield part, float(self.world)
            elif self.world > 1:
                yield torch.zeros(1, dtype=torch.int64), 0.0

    @contextmanager
    def losing_one_is_no_bug(self, hint: Callable[[], str]) -> Iterator[None]:
        """Turns the error of a collective call, whose partner is gone, into one line."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in text.lower()
                                   or "nccl" in text.lower()):
                raise Stopped(f"rank {self.rank} lost contact with another process; {hint()}"
                              ) from error
            raise


def start_processes(device: str = "auto") -> Processes:
    """Joins the group that torchrun started (NCCL on CUDA, gloo elsewhere), or works alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes(device=pick_device(device))
    rank, here = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    picked = pick_device(device)
    if picked.type == "cuda" and picked.index is None:
        require(here < torch.cuda.device_count(), f"process {here} of this machine has no GPU of "
                f"its own ({torch.cuda.device_count()} found): lower --nproc_per_node")
        picked = torch.device("cuda", here)
        torch.cuda.set_device(picked)
    require(picked.type != "mps", "several processes need CUDA or --device cpu, not MPS")
    try:
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {world} processes could not find each other ({error}); check "
                        "torchrun's --rdzv flags") from error
    return Processes(rank, world, picked)


# ---- one model in several processes --------------------------------------------------------------

class LossOf(nn.Module):
    """The training loss as a module's forward, where DDP hooks in.

    Of several `teachers` each step asks one, in turns: a cross-entropy is linear in what is taught,
    so that on average it is the mixture of all of them, for the price of one.
    """

    def __init__(self, kind: Kind, model: nn.Module, teachers: Sequence[nn.Module] = ()):
        super().__init__()
        self.kind, self.model = kind, model
        self._teachers = tuple(teachers)  # in a tuple: they are no part of what is trained

    def forward(self, batch: Corrupted, step: int = 0) -> Tensor:
        if self._teachers:
            return weighted_loss(self.model, batch, self._teachers[step % len(self._teachers)])
        return self.kind.loss(self.model, batch)


def shard(model: DiffusionTransformer, device: torch.device) -> None:
    """Spreads the weights over all processes, block by block (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.all_blocks:
        if block.cross is not None:  # used by `encode` too, outside of its block
            fully_shard(block.cross, mesh=mesh)
            register_fsdp_forward_method(block.cross, "keys_values")
        fully_shard(block, mesh=mesh)
    # What is left, embedding and head, stays whole from `hidden` on until the backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for method in ("hidden", *(["encode"] if hasattr(model, "encode") else [])):
        register_fsdp_forward_method(model, method)


def whole_state(state: Any) -> Any:
    """A state dict with whole tensors on the CPU (a collective call if they are spread)."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return whole(state).cpu() if is_spread(state) else state


def spread_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole optimizer state, spread as the parameters of `optimizer` are."""
    from torch.distributed.tensor import distribute_tensor
    params = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {}
    for index, values in state["state"].items():
        p = params[index]
        spread[index] = {
            name: distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            if is_spread(p) and value.shape == p.shape else value
            for name, value in values.items()}
    return {**state, "state": spread}


def joined(columns: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Columns of several processes as one table, sorted by the first column, each row once."""
    table = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    _, first = np.unique(table[0], return_index=True)
    return [column[first] for column in table]
