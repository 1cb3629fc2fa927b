"""A graph beside the torch model in FP32, on the same rows with hidden tokens. A library of
bundle.py, and of graphs.py, which takes INT8's scales from such rows.
"""

from cli import require

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corpus.tokens import EOS, MASK, PAD
from jetson.engine_runtime import OnnxSession
from sampling.noise import GAP_STREAM

if TYPE_CHECKING:
    from torch import Tensor

    from network.encoders import Conditions
    from sampling.left_to_right import Reader


class NoisyRow(NamedTuple):
    """A row with some of its tokens hidden."""

    clean: np.ndarray  # (W,) int64
    noisy: "Tensor"  # (1, W) int64, with [MASK] for what is hidden
    masked: np.ndarray  # (W,) bool, what is hidden
    hidden: int  # how many are
    maskable: int  # how many could be
    condition: np.ndarray | None  # (1, ...), as the model's encoder takes it


class NoisyRows:
    """Rows of a split with some of their tokens hidden, the same for every precision; with
    `conditions`, those of the split's rows."""

    def __init__(self, rows: Any, count: int, length: int, conditions: "Conditions | None",
                 draws: int = 4):
        import torch

        from corpus.rows import evenly_spread
        from corpus.tokens import pad_rows
        from diffusion import stratified_masks
        usable = np.flatnonzero(rows.lengths <= length)
        require(len(usable), f"{rows.data_dir} has no row of at most {length} tokens in its "
                             f"{rows.split} split")
        self.split, self.count = rows.split, min(count, len(usable))
        self.items: list[NoisyRow] = []
        self.plain = [rows[i].astype(np.int64) for i in usable[evenly_spread(count, len(usable))]]
        for i in usable[evenly_spread(count, len(usable))]:
            clean = torch.from_numpy(pad_rows([rows[i]]))
            for draw in range(draws):
                masked, hidden, maskable = stratified_masks(clean, np.array([i]), draw, draws, 0)
                self.items.append(NoisyRow(
                    clean[0].numpy(), clean.masked_fill(masked, MASK), masked[0].numpy(),
                    int(hidden), int(maskable),
                    None if conditions is None else conditions.batch([i])))
        self.first_text = EOS + 1  # ids below it are never predicted


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(session: OnnxSession, reference: Any, noisy: NoisyRows, condition_len: int | None,
            ) -> dict:
    """What the graph, of which logits are the last output, makes of the rows, beside the FP32
    torch model."""
    import torch
    fixed = session.inputs["tokens"][0]  # None where the graph leaves it open
    worst, agree, nats, torch_nats, tokens = 0.0, [], 0.0, 0.0, 0.0
    for item in noisy.items:
        width = item.noisy.shape[1]
        batch, length = (fixed[0] or 1, fixed[1] or width)
        context, parts = encoded(reference, item, condition_len), {}
        if context is not None:
            parts = {name: np.repeat(part.numpy(), batch, axis=0 if name == "bias" else 1)
                     for name, part in zip(("keys", "values", "bias"), context, strict=True)}
        with torch.no_grad():
            expected = reference.head(twice(reference, item, context))[0].numpy()
        row = np.zeros((batch, length), np.int64)
        row[:, :width] = item.noisy.numpy()
        # a count of 0: everything stays hidden, and carried
        arrays = dict(tokens=row, count=np.zeros(batch, np.int64), noise=np.zeros(
            (batch, 2, length)), options=np.array([1, 1, 64, 0, 2, 1]), **parts)
        if "carried" in session.inputs:
            arrays["carried"] = np.zeros((batch, length, session.inputs["carried"][0][-1]))
            arrays["carried"] = session.run(arrays)[2]
        got = session.run(arrays)[-1][0, :width]
        a, b = (logits[item.masked][:, noisy.first_text:] for logits in (expected, got))
        worst = max(worst, float(np.abs(a - b).max()))
        agree.append(a.argmax(-1) == b.argmax(-1))
        target = (np.arange(item.masked.sum()), item.clean[item.masked] - noisy.first_text)
        weight = item.maskable / item.hidden
        torch_nats -= weight * log_softmax(a)[target].sum()
        nats -= weight * log_softmax(b)[target].sum()
        tokens += item.maskable
    return {"rows": len(noisy.items), "hidden_tokens": int(sum(map(len, agree))),
            "max_logit_difference": worst, "argmax_agreement": float(np.concatenate(agree).mean()),
            "nelbo": nats / tokens, "nelbo_torch_fp32": torch_nats / tokens}


def compare_cached(reader: "Reader", reference: "Reader", noisy: NoisyRows, size: int) -> dict:
    """What a cached graph makes of the rows, left to right and in blocks of `size`, beside the FP32
    torch model; `block_kl` is that of the graph from the model at the hidden places of blocks, in
    nats."""
    worst, agree, nats, torch_nats, kl, tokens = 0.0, [], 0.0, 0.0, [], 0
    for i, row in enumerate(noisy.plain):
        hidden = (np.random.default_rng([GAP_STREAM, i]).random(len(row)) < 0.5) & (row >= EOS)
        (a, c), (b, d) = (answers(one, row, hidden, size) for one in (reference, reader))
        target = (np.arange(len(a)), row[row >= EOS] - EOS)
        torch_nats -= a[target].sum()
        nats -= b[target].sum()
        tokens += int((row > EOS).sum())
        kl.append((np.exp(c) * (c - d)).sum(-1))
        worst = max(worst, *(float(np.abs(x - y).max(initial=0)) for x, y in ((a, b), (c, d))))
        agree += [x.argmax(-1) == y.argmax(-1) for x, y in ((a, b), (c, d))]
    return {"rows": len(noisy.plain), "compared": sum(map(len, agree)), "block_size": size,
            "max_log_p_difference": worst, "argmax_agreement": float(np.concatenate(agree).mean()),
            "nll": nats / tokens, "nll_torch_fp32": torch_nats / tokens,
            "block_kl": float(np.concatenate(kl).mean())}


def answers(reader: "Reader", row: np.ndarray, hidden: np.ndarray, size: int,
            ) -> tuple[np.ndarray, np.ndarray]:
    """log p over [EOS] and text of every such token of the row left to right, and of those that are
    `hidden` (L,) in its blocks, (n, V') each."""
    before = np.append(PAD, row[:-1])[None]
    reader.begin(np.zeros(1, np.int64))
    causal = reader.read(before, logits=len(row))[0, row >= EOS, EOS:]
    reader.begin(np.zeros(1, np.int64))
    reader.read(before[:, :1])
    found = [np.zeros((0, causal.shape[1]))]
    for start in range(0, len(row), size):
        block, masked = row[None, start:start + size], hidden[start:start + size]
        if masked.any():
            found.append(reader.look(np.where(masked, MASK, block),
                                     np.flatnonzero(masked))[0, :, EOS:])
        reader.read(block)
    return log_softmax(causal), log_softmax(np.concatenate(found))


def encoded(model: Any, row: NoisyRow, condition_len: int | None) -> Any:
    """The context that the model's encoder makes of the row's condition; None without one."""
    import torch

    from corpus.tokens import pad_rows
    if row.condition is None:
        return None
    text = model.encoder.sort == "text"
    return model.encode(torch.from_numpy(
        pad_rows(list(row.condition), condition_len) if text else row.condition))


def twice(model: Any, row: NoisyRow, context: Any) -> "Tensor":
    """Hidden states (1, W, D); of a model with self-conditioning those of a second pass, as the
    bound is measured."""
    def hidden(**carried: "Tensor") -> "Tensor":
        return model.hidden(row.noisy, ratio(row), context, **carried)
    if not model.self_conditioning:
        return hidden()
    carried = model.expected(hidden()[0])[None]
    return hidden(carried=carried)


def ratio(row: NoisyRow) -> "Tensor":
    """(1,) float32: the share that is hidden."""
    import torch
    return torch.tensor([row.hidden / row.maskable])


def calibration_runs(model: Any, noisy: NoisyRows, condition_len: int | None,
                     ) -> Iterator[Callable[[], "Tensor"]]:
    """What `balance` and `activation_scales` run: the model on each of the rows."""
    for row in noisy.items:
        context = encoded(model, row, condition_len)
        yield lambda row=row, context=context: twice(model, row, context)


def block_runs(model: Any, checkpoint: dict, noisy: NoisyRows,
               ) -> Iterator[Callable[[], "Tensor"]]:
    """The same for a pass behind a cache: of each row both passes of the training, which are those
    of the graph, causal and in blocks."""
    import torch

    from corpus.tokens import pad_rows
    from kinds.registry import kind_of
    kind, generator = kind_of(checkpoint), torch.Generator().manual_seed(0)
    # those with both passes, where there are any: not the row at once, not pass 1 alone
    kind.sizes = tuple(size for size in kind.sizes if size > 0) or kind.sizes
    for row in noisy.plain:
        batch = kind.corrupt_batch(torch.from_numpy(pad_rows([row])), generator)
        yield lambda batch=batch: list(batch.parts(model))


def line_of(name: str, report: dict, seconds: float) -> str:
    quality = "" if "nll" not in report else (
        f", log p within {report['max_log_p_difference']:.2g} of torch's in FP32, likeliest token "
        f"the same at {report['argmax_agreement']:.2%} of {report['compared']:,} positions, left "
        f"to right {report['nll']:.4f} nats/token (torch {report['nll_torch_fp32']:.4f}), blocks "
        f"of {report['block_size']} within KL {report['block_kl']:.2g}")
    quality = quality if "nelbo" not in report else (
        f", logits within {report['max_logit_difference']:.2g} of torch's in FP32, likeliest token "
        f"the same at {report['argmax_agreement']:.2%} of {report['hidden_tokens']:,} hidden "
        f"positions, NELBO {report['nelbo']:.4f} (torch {report['nelbo_torch_fp32']:.4f})")
    return (f"{name}: {report['megabytes']:.1f} MB, opset {report['opset']}{quality}; "
            f"{seconds:.0f} s")
