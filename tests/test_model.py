from cli import UserError

import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model
from corpus.rows import load_meta
from corpus.tokens import BOS, EOS, MASK, PAD
from corpus.vocabulary import train_tokenizer
from kinds.checkpoints import (
    check_tokenizer,
    find_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    save_checkpoint,
    tokenizer_from_checkpoint,
)
from model import ConditionalTransformer, DiffusionTransformer, create_model
from network import attention as attention_module
from network import hardware, layers
from network.attention import HIDDEN
from network.encoders import TextEncoder
from network.hardware import device_of, pick_device, pick_precision, precision_reason
from network.layers import PRECISIONS, ModelConfig, rms_norm

CONFIG = ModelConfig(width=64, heads=2, layers=2, vocab_size=50, max_len=32)


def random_model(**changes) -> DiffusionTransformer:
    """A model with every weight random: the zero-initialised ones would hide mistakes."""
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(**{**vars(CONFIG), **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_tokens(rows=3, length=16) -> torch.Tensor:
    return torch.randint(EOS + 1, 50, (rows, length),
                         generator=torch.Generator().manual_seed(1))


def test_sizes(monkeypatch):
    monkeypatch.setitem(model.MODEL_CONFIGS, "tiny", ModelConfig(width=256, heads=4,
                                                                        layers=4))
    with torch.device("meta"):
        counts = {name: create_model(name).count_parameters()
                  for name in model.MODEL_CONFIGS}
    for name, config in model.MODEL_CONFIGS.items():
        assert config.width // config.heads == 64
        attention = 4 * config.width ** 2 + config.heads * config.width + 2 * config.width
        blocks = config.layers * (attention + 3 * config.width * config.mlp_width)
        blocks += (config.layers - 1) * 2 * config.heads
        assert abs(3 * config.mlp_width - 8 * config.width) <= 96  # as the other MLP has
        assert counts[name] == (blocks + 8192 * config.width, blocks)
    assert list(counts) == ["micro", "tiny", "small", "medium", "large", "xlarge", "xxlarge"]


def test_unknown_size_and_impossible_shapes():
    with pytest.raises(UserError, match="tiny, small"):
        create_model("huge")
    for width, heads in ((100, 3), (100, 8), (66, 2)):  # no whole number; an odd one
        with pytest.raises(UserError):
            ModelConfig(width=width, heads=heads)
    with pytest.raises(UserError):
        ModelConfig(time_conditioning="fourier")
    with pytest.raises(UserError):
        ModelConfig(vocab_size=4)
    assert ModelConfig(vocab_size=5).vocab_size == 5
    with pytest.raises(ValueError, match="max_len"):
        random_model()(random_tokens(1, 33))
    with pytest.raises(ValueError, match="context"):
        random_model()(random_tokens(), context=torch.zeros(3, 1, 64))


def test_forward_is_head_of_hidden():
    model, tokens = random_model(), random_tokens()
    hidden = model.hidden(tokens)
    assert hidden.shape == (3, 16, 64)
    masked = torch.rand(3, 16) < 0.5
    logits = model(tokens)
    assert logits.shape == (3, 16, 50)
    torch.testing.assert_close(model.head(hidden[masked]), logits[masked])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_hidden_states_of_some_positions_are_those_of_all(precision):
    torch.manual_seed(0)
    model = ConditionalTransformer(CONFIG, TextEncoder(CONFIG)).set_precision(precision)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model, tokens = model.for_inference(), random_tokens()
    told, bias = model.encode(random_tokens(3, 5)), torch.zeros(3, 1, 1, 16)
    bias[1, ..., 12:] = HIDDEN
    view = model.view(16, bias.to(model.compute_dtype))
    at = torch.tensor([[0, 3, 15], [5, 2, 9], [7, 7, 1]])
    for context in (None, told):
        every = model.hidden(tokens, None, context, view=view)
        some = model.hidden(tokens, None, context, at, view)
        tolerance = dict(fp32=1e-5, fp16=4e-3, bf16=3e-2)[precision]
        torch.testing.assert_close(some, every[torch.arange(3)[:, None], at], rtol=0,
                                   atol=tolerance)
    with pytest.raises(ValueError, match="gives all positions"):
        random_model(causal=True).hidden(tokens, at=at)


def test_special_tokens_are_never_predicted():
    for precision in ("fp32", "bf16", "fp16"):
        logits = random_model().set_precision(precision)(random_tokens()).float()
        probability = logits.softmax(-1)
        assert torch.isfinite(probability).all()
        assert (probability[..., [PAD, MASK, BOS, EOS]] == 0).all()
    # the autoregressive twin has to predict where a story ends
    probability = random_model(causal=True)(random_tokens()).softmax(-1)
    assert (probability[..., [PAD, MASK, BOS]] == 0).all() and (probability[..., EOS] > 0).all()


def reach(causal: bool) -> torch.Tensor:
    """(L, L) bool: whether a change of token j changes the hidden state at i."""
    model, tokens = random_model(causal=causal), random_tokens(1, 8)
    before = model.hidden(tokens)[0]
    result = []
    for j in range(8):
        changed = tokens.clone()
        changed[0, j] = 4 + (changed[0, j] - 3) % 46
        result.append((model.hidden(changed)[0] - before).abs().amax(-1) > 1e-6)
    return torch.stack(result, dim=1)


def test_every_position_sees_every_other_and_the_twin_only_the_past():
    assert reach(causal=False).all()
    assert torch.equal(reach(causal=True), torch.ones(8, 8).tril().bool())


@pytest.mark.parametrize("tied, off", [(False, 0.01), (True, 0.03)])
def test_a_new_model_is_the_identity_in_its_blocks(tied, off):
    model = create_model("tiny", vocab_size=50, tied_head=tied)
    tokens = random_tokens()
    expected = rms_norm(rms_norm(model.embedding(tokens)))
    torch.testing.assert_close(model.hidden(tokens), expected)
    # and starts at log V nats for the ids that it may predict
    entropy = torch.distributions.Categorical(logits=model(tokens)).entropy()
    torch.testing.assert_close(entropy, torch.full_like(entropy, 46).log(), atol=off, rtol=0)


@pytest.mark.parametrize("changes", [
    {"qk_norm": False}, {"tied_head": False}, {"causal": True}, {"mlp_ratio": 2},
    {"mlp": "relu2"}, {"value_residual": False}, {"head_gates": False}])
def test_switches_change_the_network(changes):
    tokens = random_tokens()
    assert not torch.allclose(random_model()(tokens), random_model(**changes)(tokens))


def test_tied_head_shares_its_matrix():
    tied, untied = random_model(), random_model(tied_head=False)
    assert tied.vocabulary.weight is tied.embedding.weight
    assert untied.count_parameters()[0] - tied.count_parameters()[0] == 50 * 64
    assert untied.count_parameters()[1] == tied.count_parameters()[1]


def test_dropout_acts_only_in_training():
    model, tokens = random_model(dropout=0.5), random_tokens()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_time_conditioning():
    model, tokens = random_model(time_conditioning="sinusoidal"), random_tokens()
    early, late = torch.full((3,), 0.1), torch.full((3,), 0.9)
    assert not torch.allclose(model(tokens, early), model(tokens, late))
    with pytest.raises(ValueError, match="pass t"):
        model(tokens)
    # without it t is ignored
    assert torch.equal(random_model()(tokens, early), random_model()(tokens))


def test_precision_changes_the_computation_not_the_weights():
    model, tokens = random_model(), random_tokens()
    exact = model.hidden(tokens)
    for precision in ("bf16", "fp16"):
        hidden = model.set_precision(precision).hidden(tokens)
        assert hidden.dtype == layers.PRECISIONS[precision]
        # hidden states have an RMS of 1; three digits are left in bf16
        assert (hidden.float() - exact).abs().mean() < 0.03
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_devices_and_precisions_are_found(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type in ("cpu", "cuda", "mps")
    for name in ("toaster", "meta", "cuda:99"):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)
    assert pick_precision(torch.device("cpu"), "fp16") == "fp16"
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(hardware, "block_seconds", lambda: {"fp32": 0.038, "bf16": 0.021})
    assert pick_precision(torch.device("cpu")) == "bf16"
    capabilities.clear()
    assert pick_precision(torch.device("cpu")) == "fp32"
    assert pick_precision(torch.device("mps")) == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, s=supported: s)
        assert pick_precision(torch.device("cuda")) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"


@pytest.mark.parametrize("slower, faster", [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_cpu_that_claims_bf16_is_timed_in_both_and_the_faster_is_taken(slower, faster,
                                                                        monkeypatch):
    """Whatever the flags say, and also where only the attention is what is slow; by a clock that it
    alone moves, for there are CPUs on which bf16 takes seconds."""
    now = [0.0]
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    attend, calls = attention_module.attention, []

    def attention(q, *args, **kwargs):
        calls.append(q.dtype)
        now[0] += 0.41 if q.dtype == PRECISIONS[slower] else 0.01
        return attend(q, *args, **kwargs)
    monkeypatch.setattr(attention_module, "attention", attention)
    hardware.block_seconds.cache_clear()
    cpu, before = torch.device("cpu"), torch.get_rng_state()
    try:
        with torch.no_grad():
            assert pick_precision(cpu) == faster
        timed = len(calls)
        reason = precision_reason(cpu)
        assert pick_precision(cpu) == faster and len(calls) == timed  # once in a process
    finally:
        hardware.block_seconds.cache_clear()
    assert set(calls) == {torch.float32, torch.bfloat16}
    bf16, fp32 = map(int, re.fullmatch(
        r"a block takes (\d+) ms in bf16, (\d+) ms in FP32", reason).groups())
    assert (bf16 < fp32) == (faster == "bf16") and max(bf16, fp32) > 400
    assert torch.equal(torch.get_rng_state(), before)  # a run's weights depend on its seed alone
    # what decides without a timing needs no reason; a resumed run stays what it was
    assert pick_precision(cpu, "auto", slower) == slower == pick_precision(cpu, slower)
    assert precision_reason(cpu, slower) == precision_reason(cpu, "auto", slower) == ""


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer_text():
    return train_tokenizer(["once upon a time"], 270).to_str()


def test_checkpoint_round_trip(tmp_path, tokenizer_text):
    model = random_model()
    average = {name: value + 1 for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "a.pt", model, tokenizer_text, {"story": {"5": 1}}, ema=average,
                    step=7)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["step"] == 7 and checkpoint["kind"] == "diffusion"
    assert tokenizer_from_checkpoint(checkpoint).get_vocab_size() == 270
    tokens = random_tokens()
    loaded = model_from_checkpoint(checkpoint, use_ema=False)
    assert torch.equal(loaded(tokens), model(tokens)) and not loaded.training
    averaged = model_from_checkpoint(checkpoint)
    assert all(torch.equal(value, average[name]) for name, value in averaged.state_dict().items())


def write_bomb(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "exploded"),)
    torch.save({"format": "diffusion-llm checkpoint", "x": Bomb()}, path)


def write_truncated(path):
    save_checkpoint(path, random_model(), "{}", {})
    path.write_bytes(path.read_bytes()[:2000])


def write_plain_pickle(path):
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


FOREIGN = {
    "no checkpoint": lambda path: None,
    "is not a checkpoint of this program, or is damaged": write_bomb,
    "or is damaged; name": write_truncated,
    "not a checkpoint of this program, or": lambda path: path.write_text("weights"),
    "damaged": write_plain_pickle,
    "a torch file but not": lambda path: torch.save({"weights": torch.ones(2)}, path),
    "a torch file": lambda path: torch.save(torch.ones(2), path),
    "format version 9": lambda path: torch.save(
        {"format": "diffusion-llm checkpoint", "format_version": 9}, path),
    "lacks kind, model_config": lambda path: torch.save(
        {"format": "diffusion-llm checkpoint", "format_version": 2}, path),
    "is a folder": lambda path: path.mkdir(),
    "autoregressive model": lambda path: save_checkpoint(path, random_model(causal=True), "{}", {}),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_what_is_not_a_checkpoint_is_refused(message, tmp_path):
    FOREIGN[message](tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "exploded").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", random_model(), "{}", {})
    for changes in ({"width": 32}, {"colour": "red"}):
        contents = load_checkpoint(tmp_path / "a.pt")
        contents["model_config"].update(changes)
        with pytest.raises(UserError, match="do not fit"):
            model_from_checkpoint(contents)


def test_device_of():
    assert device_of(random_model()).type == "cpu"
    assert device_of(torch.nn.Identity()).type == "cpu"
    with torch.device("meta"):
        assert device_of(create_model("tiny")).type == "meta"


def test_checkpoint_and_data_must_share_a_tokenizer(checkpoint, data_dir, long_data_dir):
    contents = load_checkpoint(checkpoint)
    check_tokenizer(checkpoint, contents, long_data_dir, load_meta(long_data_dir))
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizer(checkpoint, contents, data_dir, load_meta(data_dir))


def test_the_newest_best_checkpoint_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kinds.checkpoints.PRETRAINED", tmp_path / "pretrained.pt")
    with pytest.raises(UserError, match="train a model first"):
        find_checkpoint(None)
    # the one that comes with the repository, where it can do what is asked
    save_checkpoint(tmp_path / "pretrained.pt", random_model(), "{}", {})
    assert find_checkpoint(None) == find_checkpoint(None, "diffusion") == Path("pretrained.pt")
    assert "comes with the repository" in capsys.readouterr().err
    with pytest.raises(UserError, match="train a model first"):
        find_checkpoint(None, "autoregressive")
    for age, name in enumerate(("b", "a", "c")):
        path = tmp_path / name / "best.pt"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert find_checkpoint(None) == Path("b/best.pt")
    assert find_checkpoint("x/y.pt") == Path("x/y.pt")


def test_the_newest_checkpoint_of_the_wanted_kind_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = ConditionalTransformer(CONFIG, TextEncoder(CONFIG))
    writers = {  # the newest last
        "eldest": lambda path: save_checkpoint(path, random_model(), "{}", {}),
        "plain": lambda path: save_checkpoint(path, random_model(), "{}", {}),
        "told": lambda path: save_checkpoint(path, told, "{}", {}),
        "twin": lambda path: save_checkpoint(path, random_model(causal=True), "{}", {}),
        "torn": write_truncated, "bomb": write_bomb, "text": FOREIGN["not a checkpoint of this "
                                                                     "program, or"],
        "other": FOREIGN["a torch file but not"], "list": FOREIGN["a torch file"]}
    for age, (name, write) in enumerate(writers.items()):
        path = tmp_path / name / "best.pt"
        path.parent.mkdir()
        write(path)
        os.utime(path, (1000 + age, 1000 + age))
    for kind, name in (("autoregressive", "twin"), ("diffusion", "plain"), ("conditional", "told"),
                       (("diffusion", "conditional"), "told")):
        assert find_checkpoint(None, kind) == Path(name, "best.pt")
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"using {name}/best.pt; newer")
        assert "torn/best.pt (not to be read)" in said and "eldest" not in said
        assert ("twin/best.pt (autoregressive model)" in said) == (name != "twin")
    assert not list(tmp_path.glob("*/exploded"))
    assert find_checkpoint(None) == Path("list/best.pt")
    for name in ("told", "twin"):
        os.utime(tmp_path / name / "best.pt", (2000, 2000))
        assert find_checkpoint(None, ("conditional", "autoregressive")).parent.name == name
        assert capsys.readouterr().err == ""  # nothing newer
        (tmp_path / name / "best.pt").unlink()
    with pytest.raises(UserError, match="conditional or autoregressive model; found .*plain"):
        find_checkpoint(None, ("conditional", "autoregressive"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("time_conditioning", ["none", "sinusoidal"])
def test_inference_weights_compute_the_same(precision, time_conditioning):
    model = random_model(time_conditioning=time_conditioning).set_precision(precision)
    tokens, t = torch.randint(4, model.config.vocab_size, (2, 20)), torch.rand(2)
    tokens[:, 3:9] = MASK
    with torch.no_grad():
        before = model(tokens, t)
        after = model.for_inference()(tokens, t)
    assert torch.equal(before, after)
    assert all(p.dtype == PRECISIONS[precision] for p in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["plain", "causal", "timed", "conditional", "guided", "untied"])
def test_inference_weights_compute_the_same_to_the_bit_in_every_kind(kind, precision):
    changes = dict(causal={"causal": True}, untied={"tied_head": False, "qk_norm": False},
                   timed={"time_conditioning": "sinusoidal"}).get(kind, {})
    config = ModelConfig(**{**vars(CONFIG), **changes})
    torch.manual_seed(2)
    told = kind in ("conditional", "guided")
    model = (ConditionalTransformer(config, TextEncoder(config)) if told else
             DiffusionTransformer(config))
    for parameter in model.parameters():  # gates and biases too
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_precision(precision).eval()
    tokens, condition, t = random_tokens(), random_tokens(3, 7), torch.tensor([0.1, 0.5, 0.93])
    condition[1, 4:] = PAD
    condition[2] = PAD  # none

    def outputs() -> list[torch.Tensor]:
        context = model.encode(condition) if told else None
        hidden = model.hidden(tokens, t, context)
        if kind == "guided":
            hidden = 2 * hidden - model.hidden(tokens, t, None)
        masked = hidden.flatten(0, 1)
        return [hidden, model.head(hidden), *model.scores(masked, tokens.flatten()),
                *(context or [])]
    with torch.no_grad():
        before = outputs()
        model.for_inference()
        assert all(map(torch.equal, before, outputs()))
    assert all(tensor.isfinite().all() for tensor in before[:1])
