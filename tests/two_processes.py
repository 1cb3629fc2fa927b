"""What test_parallel.py has done by two real processes of one start: torchrun ... two_processes.py.

    torchrun --nproc_per_node 2 tests/two_processes.py DATA_DIR FOLDER

Writes FOLDER/result.json and FOLDER/weights.pt. `steps` is also what one process does alone.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from training.config import TrainConfig  # noqa: E402
from training.loader import step_seed  # noqa: E402
from training.optimizers import Muon, Part, whole  # noqa: E402
from training.processes import Processes, start_processes  # noqa: E402
from training.trainer import Trainer  # noqa: E402

CASES = {
    "bf16": dict(precision="bf16"),
    "bf16 spread": dict(precision="bf16", fsdp=True),
    "dropout": dict(dropout=0.2), "dropout again": dict(dropout=0.2),
    "dropout spread": dict(dropout=0.2, fsdp=True),
    "compiled": dict(dropout=0.2, compile=True),
    "adamw": dict(optimizer="adamw"),
    "joint": dict(objective="joint", block_sizes="causal,4,row"),
    # a process may have no row with a first pass
    "carried": dict(self_conditioning=0.2),
}
# Rows that two processes cannot share evenly, one that only one of them holds, and matrices of
# which one gets fewer or none.
SHAPES = [*[(7, 12)] * 3, *[(12, 7)] * 2, (1, 8), (9, 9)]


def steps(data_dir: str, folder: str, processes: Processes, **changes) -> tuple[dict, dict]:
    """The figures of four training steps, and the weights after them."""
    trainer = Trainer(TrainConfig(
        data_dir=data_dir, checkpoint_dir=folder, model_config="micro", batch_tokens=512,
        max_steps=4, warmup_steps=0, device="cpu", valid_rows=8, num_samples=0, grad_accum_steps=2,
        **{"precision": "fp32", "compile": False, **changes}), None, processes)
    taken = [trainer.steps.take() for _ in range(4)]
    trainer.log.close()
    weights = {name: whole(weight).clone()
               for name, weight in trainer.network.model.state_dict().items()}
    return {key: [step[key] for step in taken] for key in ("loss", "grad_norm")}, weights


def muon(precision: str, spread: bool = False) -> list[torch.Tensor]:
    """Seven matrices after three steps, the first of which has no gradient for one of them."""
    generator = torch.Generator().manual_seed(3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if spread else None

    def random(shape) -> torch.Tensor:
        x = torch.randn(shape, generator=generator)
        return distribute_tensor(x, mesh, [Shard(0)]) if spread else x
    params = [nn.Parameter(random(shape)) for shape in SHAPES]
    # some in parts, of which one process has none of the last
    parts = {params[0]: Part(1, 4), params[1]: Part(1, 4), params[3]: Part(0, 6),
             params[6]: Part(1, 3)}
    optimizer = Muon(params, lr=0.05, weight_decay=0.1, precision=precision, parts=parts)
    for step in range(3):
        for p in params:
            p.grad = random(p.shape)
        if step == 0:
            params[1].grad = None
        optimizer.step()
    return [whole(p.detach()).clone() for p in params]


def same_everywhere(processes: Processes, tensors: list[torch.Tensor]) -> bool:
    """Whether all processes hold the same bits."""
    own = [tensor.numpy().tobytes() for tensor in tensors]
    return all(other == own for other in processes.gather(own))


def main(data_dir: str, folder: str) -> None:
    with start_processes("cpu") as processes:
        result, weights = {}, {}
        for name, changes in CASES.items():
            result[name], after = steps(data_dir, folder, processes, **changes)
            result[name]["same"] = same_everywhere(processes, list(after.values()))
            weights[name] = after
        for precision in ("fp32", "bf16"):
            for spread in (False, True):
                name = f"muon {precision}" + " spread" * spread
                weights[name] = muon(precision, spread)
                result[name] = {"same": same_everywhere(processes, weights[name])}
        result["seeds"] = processes.gather(step_seed(0, 0, processes.rank))
        if processes.main:
            Path(folder, "result.json").write_text(json.dumps(result))
            torch.save(weights, Path(folder, "weights.pt"))
        processes.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
