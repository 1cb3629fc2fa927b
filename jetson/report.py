"""A graph beside the torch model in FP32, on the same rows with hidden tokens. A library of
bundle.py, and of graphs.py, which takes INT8's scales from such rows.
"""

from cli import require

from typing import Any

import numpy as np

from jetson.engine_runtime import OnnxSession


class NoisyRows:
    """Rows of a split with some of their tokens hidden, the same for every precision."""

    def __init__(self, rows: Any, count: int, length: int, conditional: bool, draws: int = 4):
        import torch

        from corpus.rows import evenly_spread
        from corpus.tokens import EOS, MASK, pad_rows
        from diffusion import stratified_masks
        usable = np.flatnonzero(rows.lengths <= length)
        require(len(usable), f"{rows.data_dir} has no row of at most {length} tokens in its "
                             f"{rows.split} split")
        self.split, self.count = rows.split, min(count, len(usable))
        told = rows.conditions() if conditional else None
        self.items = []  # clean, noisy (1, W), masked (W,), k, n, condition (1, S)
        for i in usable[evenly_spread(count, len(usable))]:
            clean = torch.from_numpy(pad_rows([rows[i]]))
            for draw in range(draws):
                masked, k, n = stratified_masks(clean, np.array([i]), draw, draws, 0)
                self.items.append((clean[0].numpy(), clean.masked_fill(masked, MASK),
                                   masked[0].numpy(), int(k), int(n),
                                   None if told is None else told.batch([i])))
        self.first_text = EOS + 1  # ids below it are never predicted


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(session: OnnxSession, reference: Any, noisy: NoisyRows, condition_len: int | None,
            ) -> dict:
    """What the graph (with its logits told) makes of the rows, beside the FP32 torch model."""
    import torch

    from corpus.tokens import pad_rows
    fixed = session.inputs["tokens"][0]  # None where the graph leaves it open
    worst, agree, nats, plain_nats, tokens = 0.0, [], 0.0, 0.0, 0.0
    for clean, hidden, masked, k, n, told in noisy.items:
        context, parts = None, {}
        batch, length = (fixed[0] or 1, fixed[1] or hidden.shape[1])
        if told is not None:
            padded = pad_rows(list(told), condition_len)
            context = reference.encode(torch.from_numpy(padded))
            parts = {name: np.repeat(part.numpy(), batch, axis=0 if name == "bias" else 1)
                     for name, part in zip(("keys", "values", "bias"), context, strict=True)}
        with torch.no_grad():
            expected = reference(hidden, torch.tensor([k / n]), context)[0].numpy()
        row = np.zeros((batch, length), np.int64)
        row[:, :hidden.shape[1]] = hidden.numpy()
        got = session.run(dict(
            tokens=row, count=np.ones(batch, np.int64), noise=np.zeros((batch, 2, length)),
            options=np.array([1, 1, 64, 0, 2, 1]), **parts))[2][0, :hidden.shape[1]]
        a, b = (logits[masked][:, noisy.first_text:] for logits in (expected, got))
        worst = max(worst, float(np.abs(a - b).max()))
        agree.append(a.argmax(-1) == b.argmax(-1))
        target = (np.arange(masked.sum()), clean[masked] - noisy.first_text)
        plain_nats -= n / k * log_softmax(a)[target].sum()
        nats -= n / k * log_softmax(b)[target].sum()
        tokens += n
    return {"rows": len(noisy.items), "hidden_tokens": int(sum(map(len, agree))),
            "max_logit_difference": worst, "argmax_agreement": float(np.concatenate(agree).mean()),
            "nelbo": nats / tokens, "nelbo_torch_fp32": plain_nats / tokens}


def calibration_inputs(model: Any, noisy: NoisyRows, condition_len: int | None):
    """What `activation_scales` runs: hidden rows, and with a condition its context."""
    import torch

    from corpus.tokens import pad_rows
    for _, hidden, _, k, n, told in noisy.items:
        context = () if told is None else (model.encode(torch.from_numpy(
            pad_rows(list(told), condition_len))),)
        yield lambda hidden=hidden, k=k, n=n, context=context: model.hidden(
            hidden, torch.tensor([k / n]), *context)


def line_of(precision: str, report: dict, seconds: float) -> str:
    quality = "" if "nelbo" not in report else (
        f", logits within {report['max_logit_difference']:.2g} of torch's in FP32, likeliest token "
        f"the same at {report['argmax_agreement']:.2%} of {report['hidden_tokens']:,} hidden "
        f"positions, NELBO {report['nelbo']:.4f} (torch {report['nelbo_torch_fp32']:.4f})")
    return (f"{precision}: {report['megabytes']:.1f} MB, opset {report['opset']}{quality}; "
            f"{seconds:.0f} s")
