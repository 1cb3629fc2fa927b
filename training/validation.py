"""What a run is judged by while it trains: its likelihood on validation rows, and stories.
A library: training/trainer.py validates with it.
"""

import dataclasses
from contextlib import nullcontext

import numpy as np
import torch

from corpus.rows import bucket_batches, evenly_spread
from corpus.tokens import decode, token_bytes
from kinds.kind import Kind, drawn_lengths
from kinds.likelihood import Nelbo
from training.building import StageData, StageModel
from training.config import TrainConfig
from training.processes import Processes, joined

BATCH_TOKENS = 8192  # of a validation batch, padding included


class Validation:
    """Judges the averaged weights, always on the same rows and with the same noise."""

    def __init__(self, config: TrainConfig, data: StageData, network: StageModel,
                 processes: Processes):
        self.config, self.data, self.network = config, data, network
        self.processes = processes
        # Spread over the split: its beginning may be of another kind than its end.
        chosen = evenly_spread(config.valid_rows, len(data.valid))
        self.batches = bucket_batches(data.valid.lengths, BATCH_TOKENS, chosen, merge=False)
        rows = [data.valid[i] for i in chosen]
        kind = network.kind  # in every mode, of a kind that has some
        self.kinds = [kind.in_mode(mode) for mode in kind.modes] or [kind]
        self.extra_nats = [kind.extra_nats(data.meta, rows) for kind in self.kinds]
        self.bytes = int(token_bytes(data.tokenizer)[np.concatenate(rows)].sum())

    def figures(self) -> dict:
        """Bound, masked cross-entropy and accuracy, by their names in metrics.jsonl; of a kind with
        modes the means over them, and the bits/byte of each."""
        each = []
        for kind, extra_nats in zip(self.kinds, self.extra_nats, strict=True):
            bound = self.bound(kind)
            each.append({
                "valid_nelbo": bound.nats_per_token, "valid_nelbo_se": bound.standard_error,
                "valid_bits_per_byte": bound.bits_per_byte(extra_nats, self.bytes),
                "valid_masked_ce": bound.masked_ce,
                "valid_masked_accuracy": bound.masked_accuracy})
        mean = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        return mean | {f"valid_bits_per_byte_{mode}": one["valid_bits_per_byte"] for mode, one in
                       zip(self.network.kind.modes, each, strict=False)}

    def in_words(self, figures: dict) -> str:
        """One line of what `figures` gave."""
        kind = self.network.kind
        modes = ", ".join(f"{mode} {figures[f'valid_bits_per_byte_{mode}']:.3f}"
                          for mode in kind.modes)
        return (f"{figures['valid_bits_per_byte']:.3f} bits/byte" * kind.of_text
                + f" (the mean of {modes})" * bool(modes) + ", " * kind.of_text
                + f"{kind.likelihood_name} {figures['valid_nelbo']:.3f} ± "
                f"{figures['valid_nelbo_se']:.3f} nats/token, "
                f"masked cross-entropy {figures['valid_masked_ce']:.3f}, accuracy "
                f"{figures['valid_masked_accuracy']:.1%}")

    def bound(self, kind: Kind | None = None) -> Nelbo:
        """The bound on the validation rows, worked out by all processes together; of a kind with
        modes in that of `kind`."""
        kind = kind or self.network.kind
        batches, conditions = self.processes.own(self.batches), self.network.valid_conditions
        bound = kind.nelbo(
            self.network.average, map(self.data.valid.batch, batches), numbers=batches,
            conditions=None if conditions is None else conditions.batch)
        columns = [getattr(bound, field.name) for field in dataclasses.fields(bound)]
        return Nelbo(*joined(self.processes.gather(columns)))

    def stories(self) -> list[str]:
        """`num_samples` stories, the same noise every time, so that progress shows; each after its
        condition, if it has one."""
        config, data, network = self.config, self.data, self.network
        count, conditions, model = config.num_samples, None, network.average
        if network.valid_conditions is not None and count:
            count = min(count, len(data.valid))
            conditions = network.valid_conditions.batch(evenly_spread(count, len(data.valid)))
        lengths = drawn_lengths(data.meta["length_histogram"], count, config.seed,
                                model.config.max_len)
        # Every story has shapes of its own, which nobody will see again: not worth compiling.
        with torch.compiler.set_stance("force_eager") if network.compiled else nullcontext():
            filled = network.kind.write(model, lengths, config.sampler(), config.seed, conditions)
        texts = [decode(data.tokenizer, row) for row in filled]
        if conditions is not None:
            texts = [f"({model.encoder.show(condition, data.tokenizer)}) {text}"
                     for condition, text in zip(conditions, texts, strict=True)]
        return texts
