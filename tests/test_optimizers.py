import pytest
import torch
from conftest import SMALL

from model import DiffusionTransformer
from training.optimizers import Muon, make_optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 96), (2, 96, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    u, values, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u * torch.linspace(10, 1, values.shape[-1]) @ vh
    result = orthogonalise(x)
    values = torch.linalg.svdvals(result)
    assert result.shape == x.shape
    assert 0.5 < values.min() and values.max() < 1.3
    # the directions are those of x: U^T result V is nearly diagonal and positive
    core = u.mT @ result @ vh.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    assert core.diagonal(dim1=1, dim2=2).min() > 0.5


def test_muon_is_torchs_own_up_to_its_bf16():
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (128, 32), (32, 128)]
    start = [torch.randn(shape) for shape in shapes]
    mine, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = dict(lr=0.02, weight_decay=0.1)
    optimizers = [Muon(mine, **settings),
                  torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)]
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, a, b in zip(start, mine, theirs, strict=True):
        moved = (a - before).norm()
        assert moved > 0.1 and (a - b).norm() < 0.03 * moved


def test_an_update_has_a_fifth_of_the_learning_rate_as_root_mean_square():
    p = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = Muon([p], lr=0.5)
    p.grad = torch.randn(64, 256)
    optimizer.step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.15)
    optimizer.zero_grad()
    before = p.clone()
    optimizer.step()  # no gradient: nothing to do
    assert torch.equal(p, before)


def test_the_momentum_is_made_once(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer, made, zeros = Muon([p], lr=0.1), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **kwargs: made.append(args) or zeros(
        *args, **kwargs))
    for _ in range(3):
        p.grad = torch.randn(8, 8)
        optimizer.step()
    assert len(made) == 1


@pytest.mark.parametrize("name, kinds", [("muon", ["Muon", "AdamW"]), ("adamw", ["AdamW"])])
def test_every_parameter_is_updated_once_and_only_matrices_decay(name, kinds):
    model = DiffusionTransformer(SMALL)
    optimizers = make_optimizers(model, name, lr=0.01, weight_decay=0.3, precision="fp16")
    assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters())
    matrices = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert len(matrices) == 2 * 8
    for group in groups:
        assert all((id(p) in matrices) == (group["weight_decay"] > 0) for p in group["params"])
    # FP16 lacks the range: Muon then works in FP32
    assert name == "adamw" or optimizers[0].dtype == torch.float32
