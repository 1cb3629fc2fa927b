"""A cached graph behind the `Reader` of sampling/left_to_right.py, without torch.

    reader = Bundle("jetson_bundle/cached_fp16.onnx").reader(Sampler(steps=4))
    for piece in write_blocks(reader, [np.array([BOS])], sampler, block_size=8, longest=256):
        print(piece.tokens)

Keys and values stand in slots that are there from the start, in the memory of the device that
computes with them. The slots of a row are a ring: token n is in slot n mod S, turned to its
position already, so that nothing is ever moved, and what no token sees any more is overwritten.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from corpus.tokens import BOS, MASK, PAD
from sampling.draft_head import DraftHead
from sampling.drawing import end_blocks, expected, unmask_step
from sampling.loop import Carried
from sampling.sampler import Sampler

HIDDEN = np.float32(-1e4)  # as in network/attention.py


class HostSlots:
    """The slots of groups of B rows, (layers, B, H, S, D/H) each, in NumPy, for an OnnxSession."""

    def __init__(self, session: Any):
        self.session, self.keys, self.values, self.new = session, [], [], []

    def begin(self, groups: int) -> None:
        for kept, name in ((self.keys, "keys"), (self.values, "values")):
            shape, dtype = self.session.inputs[name]
            kept += [np.zeros(shape, dtype) for _ in range(groups - len(kept))]

    def run(self, group: int, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The logits (B, N, V) and hidden states (B, N, D) of a pass of that group."""
        *results, keys, values = self.session.run(
            {**arrays, "keys": self.keys[group], "values": self.values[group]})
        self.new = keys, values
        return results

    def write(self, group: int, row: int, slot: int, first: int, count: int) -> None:
        """Puts what the last pass made of a row's tokens `first`, `first` + 1, ... into its slots
        from `slot` on."""
        for kept, new in zip((self.keys, self.values), self.new, strict=True):
            kept[group][:, row, :, slot:slot + count] = new[:, row, :, first:first + count]


class DeviceSlots:
    """The same on the GPU, for a TensorRTSession: neither slots nor new keys leave it."""

    def __init__(self, session: Any):
        self.session = session
        self.shape, dtype = session.inputs["keys"]
        self.bytes = int(np.prod(self.shape)) * np.dtype(dtype).itemsize
        self.token = self.shape[-1] * np.dtype(dtype).itemsize  # bytes of a token in a head
        self.groups: list[dict[str, int]] = []  # {input: address}

    def begin(self, groups: int) -> None:
        # zeros: what the mask hides has to be finite
        self.groups += [{name: self.session.zeros(self.bytes) for name in ("keys", "values")}
                        for _ in range(groups - len(self.groups))]

    def run(self, group: int, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.session.bind(self.groups[group])
        self.tokens = arrays["tokens"].shape[1]
        return self.session.run(arrays)[:2]

    def write(self, group: int, row: int, slot: int, first: int, count: int) -> None:
        layers, batch, heads, slots, _ = self.shape
        # a copy takes all heads of a row; with one row in the batch those of all layers
        parts = 1 if batch == 1 else layers
        for name, target in self.groups[group].items():
            source = self.session.buffers[f"new_{name}"].device
            for part in range(parts):
                head = (part * batch + row) * heads
                self.session.copy_lines(
                    target + (head * slots + slot) * self.token, slots * self.token,
                    source + (head * self.tokens + first) * self.token, self.tokens * self.token,
                    count * self.token, heads * layers // parts)


class GraphReader:
    """Reads causally and looks at blocks in both directions, all behind one cache. Logits of ids
    that cannot be predicted are -inf.

    A token sees at most the `max_len` before it, as in training: rows may be of any length. Rows
    are spread over groups of as many as the graph takes; what has left leaves its place empty.
    """

    def __init__(self, slots: HostSlots | DeviceSlots, sampler: Sampler, max_len: int,
                 longest: int, draft_head: DraftHead | None = None):
        self.draft_head = draft_head
        self.slots, self.sampler, self.window, self.longest = slots, sampler, max_len + 1, longest
        _, self.batch, _, self.size, _ = slots.session.inputs["keys"][0]
        # tokens of a place that self-conditioning carries on
        self.carries = slots.session.inputs.get("carried", ([0],))[0][-1] // 2
        sampler.check_model(self.carries > 0)
        self.begin(np.zeros(0, np.int64))

    # ---- Reader ----

    def begin(self, rows: np.ndarray) -> None:
        self.numbers = np.asarray(rows)
        self.seats = np.arange(len(rows))  # group x B + row of the group
        self.known = np.zeros(len(rows), np.int64)  # tokens of each row, of which [PAD] is at -1
        self.slots.begin(-(-len(rows) // self.batch))

    def read(self, tokens: np.ndarray, logits: int = 0) -> np.ndarray | None:
        parts = []
        for start in range(0, tokens.shape[1], self.longest):
            part = tokens[:, start:start + self.longest]
            parts.append(self.run(part, np.arange(len(tokens)), causal=True))
            self.known = self.known + part.shape[1]
        self.last = np.concatenate([hidden for _, hidden in parts], 1)
        if not logits:
            return None
        found = np.concatenate([found for found, _ in parts], 1)[:, -logits:]
        return possible(found, (PAD, MASK, BOS))

    def look(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        return possible(self.run(tokens, np.arange(len(tokens)), causal=False)[0][:, places],
                        (PAD, MASK, BOS))

    def hidden(self, places: np.ndarray) -> np.ndarray:
        return self.last[np.arange(len(places)), places]

    def step(self, tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
             carried: Carried = None) -> tuple[np.ndarray, np.ndarray, Carried]:
        which = np.flatnonzero(np.isin(self.numbers, rows))

        def look(carried: Carried) -> np.ndarray:
            return possible(self.run(tokens, which, causal=False, carried=carried)[0], (MASK, BOS))
        if self.carries:  # rows of which nothing is known are looked at once before
            carried = np.zeros((*tokens.shape, 2 * self.carries),
                               np.float32) if carried is None else carried
            fresh = ~carried.any((1, 2))
            if fresh.any():
                first = expected(look(None), tokens, self.carries)
                carried = np.where(fresh[:, None, None], first, carried)
        logits = look(carried)
        new, confidence = end_blocks(*unmask_step(logits, tokens, count, noise, self.sampler))
        return new, confidence, expected(logits, new, self.carries) if self.carries else None

    def forget(self, counts: np.ndarray) -> None:
        # the slots beyond the window are for what is forgotten again
        if ((self.known > self.size) & (self.known - counts > self.size - self.window + 1)).any():
            raise ValueError("what stood before these tokens has been overwritten")
        self.known = np.array(counts)

    def keep(self, rows: np.ndarray) -> None:
        self.numbers, self.seats, self.known = (
            x[rows] for x in (self.numbers, self.seats, self.known))

    # ---- graph ----

    def run(self, tokens: np.ndarray, which: np.ndarray, causal: bool,
            carried: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Logits (R, N, V) and hidden states (R, N, D) of the next tokens (R, N) of some rows of
        the batch; a causal pass stays in the cache. `carried` (R, N, 2K) is what an
        earlier pass expected."""
        count = tokens.shape[1]
        if count > self.longest:
            raise ValueError(f"a pass of {count} tokens: the graph takes {self.longest} at most")
        masks = self.masks(count, self.known[which], causal)
        positions = self.known[which, None] - 1 + np.arange(count)
        group, seat = np.divmod(self.seats[which], self.batch)
        results: list[Any] = [None] * len(which)
        for g in np.unique(group):
            here = np.flatnonzero(group == g)
            # empty places see their own tokens, so that every softmax has something
            arrays = dict(tokens=np.full((self.batch, count), PAD, np.int32),
                          positions=np.zeros((self.batch, count), np.int32),
                          mask=np.zeros((self.batch, 1, count, self.size + count), np.float32))
            if self.carries:
                arrays["carried"] = np.zeros((self.batch, count, 2 * self.carries),
                                             np.float32)
            for name, x in (("tokens", tokens), ("positions", positions), ("mask", masks),
                            ("carried", carried)):
                if x is not None:
                    arrays[name][seat[here]] = x[here]
            logits, hidden = self.slots.run(int(g), arrays)
            for i in here:
                results[i] = logits[seat[i]], hidden[seat[i]]
                if causal:
                    self.write(int(g), int(seat[i]), int(self.known[which[i]]), count)
        return tuple(map(np.stack, zip(*results, strict=True)))

    def write(self, group: int, row: int, known: int, count: int) -> None:
        """The last pass's keys and values of a row go behind those of the `known` tokens, round the
        ring."""
        slot = known % self.size
        fitting = min(count, self.size - slot)
        self.slots.write(group, row, slot, 0, fitting)
        if count > fitting:
            self.slots.write(group, row, 0, fitting, count - fitting)

    def masks(self, count: int, known: np.ndarray, causal: bool) -> np.ndarray:
        """What the next `count` tokens of rows that know so many must not see: 0 or HIDDEN,
        (R, 1, N, S + N)."""
        known, new = known[:, None, None], np.arange(count)
        # the newest token in each slot, (R, 1, S); below 0 there is none
        token = known - 1 - (known - 1 - np.arange(self.size)) % self.size
        last = known + (new[:, None] if causal else count - 1)  # that a token sees, (R, N or 1, 1)
        hidden = (token < 0) | (token <= last - self.window)
        mask = np.zeros((len(known), 1, count, self.size + count), np.float32)
        mask[:, 0, :, :self.size][np.broadcast_to(hidden, (len(known), count, self.size))] = HIDDEN
        if causal:
            mask[..., self.size:][..., new > new[:, None]] = HIDDEN
        return mask


def possible(logits: np.ndarray, never: Sequence[int]) -> np.ndarray:
    """The same with the ids that cannot be predicted at -inf; changes and returns it."""
    logits[..., list(never)] = -np.inf
    return logits
