import dataclasses
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinds.likelihood import Corrupted
from model import DiffusionTransformer, create_conditional_model
from network.layers import ModelConfig
from training import speed as speed_module
from training.compiling import compile_blocks
from training.speed import EnergyMeter, Speedometer, peak_flops, peak_memory, train_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [32, 64])
def test_flops_are_those_that_torch_counts(length):
    model = DiffusionTransformer(ModelConfig(width=64, heads=2, layers=3, vocab_size=100,
                                             max_len=64))
    tokens = torch.randint(4, 100, (5, length))
    masked = torch.rand(5, length) < 0.5
    count = int(masked.sum())
    # (the counter does not know the CPU's fused attention)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model.head(model.hidden(tokens)[masked])
        logits[:, 4:].sum().backward()
    assert train_flops(model, 5, length, count) == pytest.approx(counter.get_total_flops(),
                                                                 rel=0.01)


@pytest.mark.parametrize("frozen", [True, False])
def test_flops_with_a_condition_are_those_that_torch_counts(frozen):
    model = create_conditional_model("micro", "tiny", vocab_size=100, max_len=64,
                                     condition_len=32)
    if frozen:
        model.freeze_decoder()
    tokens, told = (torch.randint(4, 100, (5, length)) for length in (64, 32))
    masked = torch.rand(5, 64) < 0.5
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model.head(model.hidden(tokens, context=model.encode(told))[masked])
        logits[:, 4:].sum().backward()
    # frozen, nothing goes back through the first block's attention, which is counted all the same
    assert train_flops(model, 5, 64, int(masked.sum()), 32) == pytest.approx(
        counter.get_total_flops(), rel=0.1 if frozen else 0.01)


def test_a_causal_mask_halves_the_attention():
    full, half = (DiffusionTransformer(ModelConfig(causal=causal)) for causal in (False, True))
    difference = train_flops(full, 2, 256, 10) - train_flops(half, 2, 256, 10)
    assert difference == 6 * 6 * 256 * 384 * 2 * 256


def test_speed_is_that_since_the_last_reading(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: next(clock))
    speed = Speedometer(peak=1000.0)  # at 0
    speed.count(30, 400)
    speed.count(10, 600)
    assert speed.read() == {"tokens_per_second": 20.0, "mfu": 0.5}  # 2 s
    speed.count(99, 99)
    speed.start()  # at 7: what came before does not count
    speed.count(5, 100)
    assert speed.read() == {"tokens_per_second": 5.0, "mfu": 0.1}


def test_measured_peak_is_the_machines():
    peak = peak_flops(CPU, "fp32", seconds=0.05)
    assert 1e8 < peak < 1e15


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_peak_memory_forgets_what_was_before():
    big = torch.ones(2**27)  # 512 MiB
    del big
    with peak_memory(CPU) as peak:
        base = peak()
        x = torch.ones(2**25)  # 128 MiB
    assert 2**26 < peak() - base < 2**28 and x.sum() == 2**25


# ---- compiling -----------------------------------------------------------------------------------

def batch(rows: int, length: int) -> Corrupted:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(4, 8192, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < 0.5
    return Corrupted(tokens, tokens.masked_fill(masked, 1), masked, masked.float(),
                     torch.ones(rows))


def gradients(model, inputs) -> list:
    from kinds.likelihood import weighted_loss
    model.zero_grad()
    loss = weighted_loss(model, inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_blocks_compute_the_same_and_new_shapes_need_no_compilation():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DiffusionTransformer(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    shapes = [(3, 64), (5, 48), (1, 240), (2, 16), (7, 32), (4, 256), (16, 160)]
    expected = [gradients(model, batch(*shape)) for shape in shapes]
    assert compile_blocks(model, CPU, 256) is None
    assert all(p.grad is None for p in model.parameters())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled >= 1
    for shape, values in zip(shapes, expected, strict=True):
        for a, b in zip(gradients(model, batch(*shape)), values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # one row is special to the compiler, for the first block and for the last, and so are few
    # tokens for the last; every other shape must run what is there
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= compiled + 3


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_blocks_drop_what_others_drop():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DiffusionTransformer(dataclasses.replace(SMALL, dropout=0.3)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)

    def seeded(shape, seed) -> list:
        torch.manual_seed(seed)
        return gradients(model, batch(*shape))
    cases = [((3, 64), 1), ((3, 64), 2), ((5, 48), 1)]
    expected = [seeded(*case) for case in cases]
    assert not torch.allclose(expected[0][0], expected[1][0])
    assert compile_blocks(model, CPU, 256) is None
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for case, values in zip(cases, expected, strict=True):
        for a, b in zip(seeded(*case), values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # few tokens are special to the compiler
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= compiled + 1


def test_what_cannot_be_compiled_stays_eager_and_says_why(monkeypatch):
    model = DiffusionTransformer(SMALL)
    assert "MPS" in compile_blocks(model, torch.device("mps"), 64)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in compile_blocks(model, CPU, 64)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")

    def broken(*args, **kwargs):
        raise RuntimeError("\nno such header\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: broken)
    assert "no such header" in compile_blocks(model, CPU, 64)
    gradients(model, batch(2, 16))  # and it works as before


# ---- energy --------------------------------------------------------------------------------------

def counter(folder, joules: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(str(int(joules * 1e6)))
    (folder / "max_energy_range_uj").write_text(str(1000 * 10**6))


def test_energy_of_the_packages_also_when_a_counter_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(EnergyMeter, "RAPL", tmp_path)
    first, second = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:1"
    counter(first, 100)
    counter(second, 990)
    with EnergyMeter(CPU) as energy:
        counter(first, 150)
        counter(second, 20)
        assert energy.joules() == pytest.approx(50 + 30)
        for joules in (900, 100, 800, 50):  # full twice more between two looks at the sum
            counter(first, joules)
            energy._read()
        assert energy.joules() == pytest.approx(80 + 850 + 100 + 100 + 700 + 250 - 100)


def test_energy_is_none_where_the_machine_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(EnergyMeter, "RAPL", tmp_path)
    with EnergyMeter(CPU) as energy:
        assert energy.joules() is None
    monkeypatch.setattr(speed_module.subprocess, "run", lambda *args, **kwargs: (
        _ for _ in ()).throw(OSError))
    with EnergyMeter(torch.device("cuda", 0)) as energy:
        assert energy.joules() is None


def test_energy_of_a_gpu_is_its_power_over_time(monkeypatch):
    monkeypatch.setattr(EnergyMeter, "INTERVAL", 0.02)
    asked = []

    def smi(command, **kwargs):
        asked.append(command)
        return types.SimpleNamespace(stdout="200.0\n")

    monkeypatch.setattr(subprocess, "run", smi)
    import time
    started = time.perf_counter()
    with EnergyMeter(torch.device("cuda", 1)) as energy:
        while len(asked) < 5:
            time.sleep(0.005)
    assert 0 < energy.joules() <= 200 * (time.perf_counter() - started)
    assert "--id=1" in asked[0]
