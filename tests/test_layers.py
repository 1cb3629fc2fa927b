import pytest
import torch

from model import DiffusionTransformer
from network import attention as attention_module
from network import dropout as dropout_module
from network import layers, transformer
from network.attention import View
from network.layers import ModelConfig


@pytest.mark.parametrize("causal", [False, True])
def test_heads_look_at_their_neighbours_at_first(causal):
    """Without content, each head of a new model puts its largest weight on its own neighbour."""
    model = DiffusionTransformer(ModelConfig(width=256, heads=4, max_len=64, causal=causal))
    attention = model.blocks[0].attention
    q, k = (bias.detach().expand(4, 64, 64) for bias in (attention.query_bias, attention.key_bias))
    q, k = (attention_module.rotate(layers.rms_norm(x), model.cos, model.sin) for x in (q, k))
    scores = (q @ k.mT) / 8  # (4, 64, 64)
    middle = range(8, 56)
    best = [{int(scores[head, i].argmax()) - i for i in middle} for head in range(4)]
    assert best == ([{-1}, {-2}, {-3}, {-4}] if causal else [{-1}, {1}, {-2}, {2}])
    plain = DiffusionTransformer(ModelConfig(neighbour_init=0.0))
    assert not any("bias" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("dropout, share", [(0.25, 0.25), (0.1, 26 / 256), (1e-6, 1 / 256),
                                            (0.9999, 255 / 256)])
def test_dropout_drops_its_share_and_keeps_the_mean(dropout, share):
    torch.manual_seed(0)
    factors = dropout_module.dropout_factors((2, 3, 99, 101), dropout, torch.ones(1))
    assert factors.shape == (2, 3, 99, 101) and factors.dtype == torch.float32
    assert factors.unique().tolist() == [0.0, pytest.approx(1 / (1 - share))]
    dropped = (factors == 0).float().flatten()
    error = (share * (1 - share) / len(dropped)) ** 0.5
    assert abs(dropped.mean() - share) < 4 * error
    # neighbours know nothing of each other
    for distance in (1, 7, 8, 101):
        both = (dropped[distance:] * dropped[:-distance]).mean()
        assert abs(both - share ** 2) < 6 * (share ** 2 / len(dropped)) ** 0.5


def test_dropout_acts_on_what_attention_and_mlp_add_and_on_nothing_else():
    torch.manual_seed(0)
    config = ModelConfig(width=64, heads=2, dropout=0.25)
    block = transformer.Block(config)
    x, view = torch.randn(2, 16, 64), View(torch.ones(16, 16), torch.ones(16, 16))
    seeds = torch.tensor([11, 12])
    attention_factors, mlp_factors = (dropout_module.dropout_factors(
        x.shape, 0.25, x, torch.Generator().manual_seed(seed)) for seed in (11, 12))
    assert not torch.equal(attention_factors, mlp_factors)
    with torch.no_grad():
        torch.nn.init.normal_(block.attention.out.weight)  # (the MLP adds nothing yet)
        added = block(x, view)[0] - x
        assert added.abs().min() > 0
        torch.testing.assert_close(block(x, view, seeds)[0], x + added * attention_factors)
        torch.nn.init.zeros_(block.attention.out.weight)
        torch.nn.init.normal_(block.down.weight)
        added = block(x, view)[0] - x
        torch.testing.assert_close(block(x, view, seeds)[0], x + added * mlp_factors)


def test_every_layer_drops_something_else_and_the_same_again_with_the_same_seed():
    asked, config = [], ModelConfig(width=32, heads=2, layers=3, dropout=0.5, vocab_size=50)
    model = DiffusionTransformer(config).train()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs: asked.append(inputs[2].tolist()))
    tokens = torch.full((2, 16), 7)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.hidden(tokens)
    first, again, other = asked[:3], asked[3:6], asked[6:]
    assert first == again and len({seed for pair in first + other for seed in pair}) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_same_factors_and_keeps_none_of_them(dtype):
    x, seed = torch.randn(3, 40, 24).to(dtype).requires_grad_(), torch.tensor(5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):
        y = dropout_module.dropped(x, seed, 0.3)
    assert sum(kept) == 1  # the seed
    slope = torch.randn(24, 40, 3).to(dtype).permute(2, 1, 0)  # not in the order of memory
    factors = dropout_module.dropout_factors(x.shape, 0.3, x, torch.Generator().manual_seed(5))
    assert torch.equal(y, x * factors)
    before = torch.get_rng_state()
    y.backward(slope)
    assert torch.equal(x.grad, slope * factors) and torch.equal(torch.get_rng_state(), before)
    torch.library.opcheck(torch.ops.diffusion_llm.dropped, (x.detach().requires_grad_(), seed, 0.3))


def test_rotary_positions_are_relative():
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    model = DiffusionTransformer(ModelConfig(width=64, heads=2, max_len=32))
    scores = [(attention_module.rotate(q, model.cos[i:i + 1], model.sin[i:i + 1])
               * attention_module.rotate(k, model.cos[j:j + 1], model.sin[j:j + 1])).sum()
              for i, j in ((5, 2), (25, 22), (5, 3))]
    torch.testing.assert_close(scores[0], scores[1])
    assert abs(scores[0] - scores[2]) > 1e-3


def test_bf16_attention_of_the_cpu_is_attention():
    q, k, v = torch.randn(3, 2, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = attention_module.attention(q, k, v, causal=False)
    actual = attention_module.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=False)
    torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.03)
