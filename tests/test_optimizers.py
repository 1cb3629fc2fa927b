import pytest
import torch
from conftest import SMALL

from model import DiffusionTransformer, create_conditional_model
from training.optimizers import Muon, Part, in_parts, make_optimizers, orthogonalise, parts_of


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


@pytest.mark.parametrize("dim, size", [(0, 4), (1, 4), (0, 12), (1, 20)])
def test_parts_are_orthogonalised_each_on_its_own(dim, size):
    x = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    result = in_parts(x, Part(dim, size))
    for matrix, made in zip(x, result, strict=True):
        for piece, own in zip(matrix.split(size, dim), made.split(size, dim), strict=True):
            torch.testing.assert_close(own, orthogonalise(piece[None])[0])
    # a process that has none of them, of more processes than matrices
    assert in_parts(x[:0], Part(dim, size)).shape == (0, 12, 20)


def test_attention_is_cut_by_heads_and_the_mlp_into_even_parts():
    for name, hidden in (("micro", 160), ("small", 128), ("medium", 168)):
        model = create_conditional_model("micro", name, vocab_size=64)
        for block in model.all_blocks:
            parts = parts_of(block)
            matrices = [p for p in block.parameters() if p.ndim == 2]
            gates = [p for p in matrices if p.shape[0] < 16]  # one row a head
            assert parts.keys() == {*matrices} - {*gates}
            assert parts[block.attention.value.weight] == (0, 64)
            assert parts[block.attention.out.weight] == (1, 64)
        block = model.blocks[0]
        assert parts_of(block)[block.cross.key.weight] == (0, 64)
        assert parts_of(block)[block.up.weight] == (0, hidden)
        assert parts_of(block)[block.down.weight] == (1, hidden)


def test_a_part_moves_as_far_as_adamw_would_move_it():
    """Root mean square 0.2 of the learning rate, whatever the parts (arXiv 2502.16982, eq. 4)."""
    for part in (None, Part(0, 8), Part(1, 16)):
        p = torch.nn.Parameter(torch.zeros(32, 64))
        p.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        Muon([p], lr=1.0, parts={p: part} if part else None).step()
        assert 0.15 < float(p.detach().square().mean().sqrt()) < 0.25
