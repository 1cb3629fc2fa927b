"""Low-rank adapters: nothing at first, merged and unmerged alike, trained alone, kept alone."""

from cli import Stopped, UserError

import pytest
import torch
from torch import nn

import generate
import train
from kinds.adapters import ADAPTER_FORMAT, base_hash
from kinds.checkpoints import load_adapted, load_checkpoint, model_from_checkpoint
from model import create_conditional_model, create_model, is_of_condition
from network.lora import adapted, merge, unmerge
from training import slim
from training.config import TrainConfig
from training.trainer import Trainer

ALL = "query,key,value,out,up,gate,down"
SHORT = ["--batch_tokens", "512", "--valid_every", "3", "--valid_rows", "8", "--num_samples", "0",
         "--device", "cpu", "--precision", "fp32"]


def toy(targets: str = ALL, rank: int = 3, **settings) -> nn.Module:
    torch.manual_seed(0)
    return create_model("micro", vocab_size=64, max_len=32, lora_rank=rank, lora_alpha=5.0,
                        lora_targets=targets, **settings)


def stir(model: nn.Module) -> nn.Module:
    """Weights in what begins at zero: adapters, output projections, gates."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


TOKENS = torch.randint(4, 64, (3, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["query", "key,up", "value,out,down", ALL])
def test_at_first_they_change_nothing_to_the_bit(targets, precision):
    torch.manual_seed(0)
    plain = create_model("micro", vocab_size=64, max_len=32)
    with_them = toy(targets)
    for name, weight in plain.state_dict().items():
        assert torch.equal(with_them.state_dict()[name], weight)
    stirred = stir(plain).state_dict()
    with_them.load_state_dict(stirred, strict=False)
    for model in (plain, with_them):
        model.set_precision(precision)
    assert torch.equal(plain(TOKENS), with_them(TOKENS))


def test_every_target_has_its_matrices_and_no_other():
    for target in ALL.split(","):
        model = toy(target)
        names = [name for name, _ in model.named_parameters() if ".lora." in name]
        assert len(names) == 2 * model.config.layers
        assert all(f".{target}.lora." in name for name in names)
    with pytest.raises(UserError, match="has no gate"):
        toy("query,gate", mlp="relu2")
    # cross-attention is trained whole
    conditional = create_conditional_model("micro", "micro", 64, lora_rank=2, lora_alpha=2.0,
                                           lora_targets=ALL)
    assert not [name for name, _ in conditional.named_parameters()
                if ".lora." in name and (".cross." in name or name.startswith("encoder."))]


def test_the_sum_is_that_of_the_paper():
    """alpha / rank * B A, in every map: against the product written out."""
    model = stir(toy())
    linear = model.blocks[1].attention.value
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3))
    a, b = linear.lora.down.weight, linear.lora.up.weight
    expected = x @ (linear.weight + 5.0 / 3 * b @ a).T
    torch.testing.assert_close(linear(x), expected)


def test_merged_equals_unmerged_and_comes_out_again():
    model = stir(toy()).requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(TOKENS)
    merge(model)
    assert not list(adapted(model))
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # one rounding of each weight, 2^-24 of it: what the network makes of that
    torch.testing.assert_close(model(TOKENS), expected, atol=2e-4, rtol=1e-4)
    unmerge(model)
    assert model.state_dict().keys() == before.keys()
    for name, weight in model.state_dict().items():
        most = 2.0 ** -22 * max(1.0, float(before[name].abs().max()))
        assert (weight - before[name]).abs().max() <= most, name
    torch.testing.assert_close(model(TOKENS), expected, atol=2e-4, rtol=1e-4)


def test_behind_a_cache_they_count_too():
    """The three maps of attention are one product there, where nothing stands beside them."""
    from network.attention import Cache
    model = stir(toy(causal=True)).requires_grad_(False).eval()
    whole, cache = model.hidden(TOKENS[:1]), Cache()
    parts = [model.hidden(TOKENS[:1, i:i + 4], view=model.view(4, cache=cache))
             for i in range(0, 32, 4)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings, said", [
    (dict(lora_rank=2, lora_targets=""), "give both"),
    (dict(lora_rank=0, lora_targets="query"), "give both"),
    (dict(lora_rank=2, lora_targets="query,head"), "choose from query"),
])
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        create_model("micro", **settings)


@pytest.fixture(scope="module")
def adapter_run(checkpoint, pairs_dir, tmp_path_factory):
    """A stage 2 with adapters, and its adapter's file."""
    folder = tmp_path_factory.mktemp("lora")
    train.main(["--stage", "2", "--decoder_checkpoint", str(checkpoint), "--data_dir",
                str(pairs_dir), "--checkpoint_dir", str(folder / "run"), "--lora_rank", "2",
                "--lora_targets", "query", "value", "--max_steps", "6", *SHORT])
    slim.main(["--adapter", "--checkpoint", str(folder / "run/best.pt"), "--output",
               str(folder / "adapter.pt")])
    return folder


def test_only_they_and_what_reads_the_condition_move(adapter_run, checkpoint):
    base = load_checkpoint(checkpoint)
    run = load_checkpoint(adapter_run / "run/last.pt", None)
    moved, still = set(), set()
    for name, weight in run["weights"].items():
        if name in base["ema"]:
            (still if torch.equal(weight, base["ema"][name]) else moved).add(name)
    assert not moved and still == set(base["ema"])
    begun = [name for name, weight in run["weights"].items()
             if ".lora.up." in name and weight.any()]
    assert len(begun) == 2 * len(model_from_checkpoint(base).blocks)


def test_a_run_with_them_goes_on_as_if_it_had_not_stopped(checkpoint, pairs_dir, tmp_path):
    settings = dict(stage=2, decoder_checkpoint=str(checkpoint), data_dir=str(pairs_dir),
                    lora_rank=2, batch_tokens=512, valid_every=2, save_every=2, valid_rows=4,
                    num_samples=0, device="cpu", precision="fp32", condition_dropout=0.5,
                    max_steps=4)
    whole, halves = (TrainConfig(**settings, checkpoint_dir=str(tmp_path / name))
                     for name in ("whole", "halves"))
    Trainer(whole).run()
    stopped = Trainer(halves)
    take = stopped.steps.take

    def take_two() -> dict:
        if stopped.progress.step == 1:
            stopped.stop_signal = 15
        return take()
    stopped.steps.take = take_two
    with pytest.raises(Stopped):
        stopped.run()
    train.main(["--resume", "--checkpoint_dir", str(tmp_path / "halves")])
    one, other = (load_checkpoint(tmp_path / name / "last.pt", None)["weights"]
                  for name in ("whole", "halves"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    assert load_checkpoint(tmp_path / "whole/last.pt", None)["model_config"]["lora_alpha"] == 4.0


def test_the_file_holds_nothing_else(adapter_run, checkpoint):
    adapter = torch.load(adapter_run / "adapter.pt", weights_only=True)
    assert adapter["format"] == ADAPTER_FORMAT
    assert all(map(is_of_condition, adapter["weights"]))
    assert {weight.dtype for weight in adapter["weights"].values()} == {torch.bfloat16}
    assert adapter["lora"] == {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "query,value"}
    assert adapter["base_sha256"] == base_hash(load_checkpoint(checkpoint)["ema"])
    assert "data_dir" not in adapter["train_config"]


def test_with_its_base_it_is_the_checkpoint_again(adapter_run, checkpoint, tmp_path, monkeypatch,
                                                  capsys, fails):
    both = load_adapted(adapter_run / "adapter.pt", checkpoint)
    run = load_checkpoint(adapter_run / "run/best.pt", None)
    assert both["kind"] == run["kind"] and both["encoder"] == "text"
    for name, weight in model_from_checkpoint(both).state_dict().items():
        expected = run["ema"][name]
        expected = expected.bfloat16().float() if is_of_condition(name) else expected
        assert torch.equal(weight, expected), name
    # found beside it by its content, whatever it is called
    (tmp_path / "some").mkdir()
    (tmp_path / "some/any.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "some/mine.pt").write_bytes((adapter_run / "adapter.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    found = load_checkpoint("some/mine.pt", None)
    assert found["weights"].keys() == both["weights"].keys()
    told = ["--condition", "A cat ran.", "--steps", "2", "--num_samples", "1", "--length", "12",
            "--json"]
    generate.main(["--checkpoint", "some/mine.pt", *told])
    generate.main(["--checkpoint", "some/any.pt", "--adapter", "some/mine.pt", *told])
    generate.main(["--adapter", "some/mine.pt", "some/mine.pt", *told])  # in turn, its own base
    one, two, three, four = capsys.readouterr().out.splitlines()
    assert one == three == four
    assert one.replace("some/mine.pt", "X") == two.replace("some/any.pt with some/mine.pt", "X")
    # and refused beside anything else
    other = load_checkpoint("some/any.pt")
    name = next(iter(other["ema"]))
    other["ema"][name] = other["ema"][name] + 1e-3
    torch.save(other, "some/any.pt")
    assert "was not trained beside" in fails(
        generate.main, "--checkpoint", "some/any.pt", "--adapter", "some/mine.pt", *told)
    assert "not here" in fails(generate.main, "--checkpoint", "some/mine.pt", *told)
    assert "give one of them" in fails(generate.main, "--trace", "x.html", "--adapter",
                                       "some/mine.pt", "some/mine.pt", *told)
    assert "not an adapter" in fails(
        generate.main, "--checkpoint", "some/any.pt", "--adapter", "some/any.pt", *told)


@pytest.mark.parametrize("change, said", [
    (dict(format_version=9), "version 9"), (dict(weights={"a": 1}), "weights"),
    (dict(weights={"embedding.weight": torch.ones(1)}), "weights"),
    (dict(lora={"width": 3}), "lora"), (dict(kind="joint"), "kind")])
def test_a_damaged_one_is_refused(adapter_run, checkpoint, tmp_path, change, said):
    adapter = torch.load(adapter_run / "adapter.pt", weights_only=True) | change
    torch.save(adapter, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=said):
        load_adapted(tmp_path / "bad.pt", checkpoint)


def test_flags_that_do_not_belong_together(checkpoint, pairs_dir, tmp_path, fails):
    start = ["--data_dir", str(pairs_dir), "--checkpoint_dir", str(tmp_path / "x"), *SHORT]
    second = ["--stage", "2", "--decoder_checkpoint", str(checkpoint), *start]
    assert "--stage 2" in fails(train.main, "--lora_rank", "2", *start)
    assert "--lora_rank" in fails(train.main, "--lora_alpha", "2", *second)
    assert "some of query" in fails(train.main, "--lora_rank", "2", "--lora_targets", "head",
                                    *second)
    assert "0 to 1024" in fails(train.main, "--lora_rank", "-1", *second)
