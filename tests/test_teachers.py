"""Distillation: a model that learns what others say instead of the text's tokens."""

import pytest
import torch

from block_diffusion import JointDiffusion
from corpus.tokens import BOS, EOS
from diffusion import DiscreteDiffusion
from kinds.autoregressive import Autoregressive
from kinds.checkpoints import load_checkpoint
from kinds.likelihood import weighted_loss
from model import DiffusionTransformer
from network.layers import ModelConfig
from train import main as train
from training.processes import LossOf

VOCAB = 20
KINDS = {"masked": (DiscreteDiffusion(), {}), "left to right": (Autoregressive(), {"causal": True}),
         "elbo": (DiscreteDiffusion(objective="elbo"), {}),
         "joint": (JointDiffusion((4, 0, -1)), {}),
         "carried": (JointDiffusion((4, 0, -1)), {"self_conditioning": 1.0})}


def network(seed: int, **settings) -> DiffusionTransformer:
    torch.manual_seed(seed)
    model = DiffusionTransformer(ModelConfig(**{"width": 16, "heads": 2, "layers": 2, "max_len": 12,
                                                "vocab_size": VOCAB, **settings}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def a_batch(kind):
    rows = torch.randint(EOS + 1, VOCAB, (9, 10), generator=torch.Generator().manual_seed(1))
    rows[:, 0], rows[:, -1] = BOS, EOS
    return kind.corrupt_batch(rows, torch.Generator().manual_seed(0))


def gradients(model, loss) -> list:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(model.parameters(), grads, strict=True)]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_learns_nothing_from_itself(name):
    """The cross-entropy with its own distribution is at its least."""
    kind, settings = KINDS[name]
    model, batch = network(0, **settings), a_batch(kind)
    own = weighted_loss(model, batch, network(0, **settings).eval())
    assert max(g.abs().max() for g in gradients(model, own)) < 1e-6
    other = weighted_loss(model, batch, network(1, **settings).eval())
    assert other > own and max(g.abs().max() for g in gradients(model, other)) > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_teachers_in_turns_are_their_mixture_on_average(name):
    """Also teachers of other sizes."""
    kind, settings = KINDS[name]
    model, batch = network(0, **settings), a_batch(kind)
    teachers = [network(1, **settings).eval(), network(2, **settings, layers=3, width=24).eval()]
    loss_of = LossOf(kind, model, teachers)
    losses = [loss_of(batch, step) for step in (4, 5)]
    torch.testing.assert_close(losses[0], weighted_loss(model, batch, teachers[0]))
    torch.testing.assert_close(losses[1], weighted_loss(model, batch, teachers[1]))
    expected = 0.0
    with torch.no_grad():
        for own, *said in zip(*(batch.parts(m) for m in (model, *teachers)), strict=True):
            hidden, _, weights, *ends = own
            q = sum(t.head(part[0], *ends).softmax(-1) for t, part in zip(
                teachers, said, strict=True)) / 2
            log_p = model.head(hidden, *ends).log_softmax(-1)
            expected -= ((q * log_p.clamp(min=-1e4)).sum(-1) * weights).sum()
    torch.testing.assert_close(sum(losses) / 2, expected)
    # and they are no part of what is trained
    assert len(list(loss_of.parameters())) == len(list(model.parameters()))


def flags(long_data_dir, folder, *more) -> list[str]:
    return [*map(str, ("--model_config", "tiny", "--data_dir", long_data_dir, "--checkpoint_dir",
                       folder, "--batch_tokens", 512, "--max_steps", 3, "--valid_rows", 8,
                       "--num_samples", 0, "--device", "cpu", "--precision", "fp32", *more))]


def test_a_run_with_teachers_resumes(checkpoint, sharp_checkpoint, long_data_dir, tmp_path):
    """With the teacher whose turn it is, in every part of a step."""
    weights = []
    steady = ("--teachers", checkpoint, sharp_checkpoint, "--dropout", 0.1, "--warmup_steps", 0,
              "--min_lr_ratio", 1, "--grad_accum_steps", 2)
    for name, stops in (("whole", ()), ("parts", ("--max_steps", "1"))):
        folder = tmp_path / name
        train([*flags(long_data_dir, folder, *steady), *stops])
        if stops:
            train(["--resume", "--checkpoint_dir", str(folder), "--max_steps", "3"])
        last = load_checkpoint(folder / "last.pt")
        weights.append(last["weights"])
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())
    assert last["train_config"]["teachers"] == [str(checkpoint), str(sharp_checkpoint)]
    assert last["weights"].keys() == load_checkpoint(checkpoint)["weights"].keys()


def test_what_is_refused(checkpoint, twin, joint_checkpoint, data_dir, long_data_dir, tmp_path,
                         fails):
    def error(*more, data=long_data_dir):
        text = fails(train, *flags(data, tmp_path / "run", *more))
        assert not (tmp_path / "run").exists()
        return text
    assert "no checkpoint nowhere.pt" in error("--teachers", "nowhere.pt")
    assert "autoregressive model" in error("--teachers", twin)
    assert "another tokenizer" in error("--teachers", checkpoint, data=data_dir)
    assert "--teachers: the draft head alone" in error(
        "--objective", "draft", "--init_from", joint_checkpoint, "--teachers", joint_checkpoint)
