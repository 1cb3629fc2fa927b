"""What writes the stories of generate.py, however it was opened. A library of generate.py, and of
kinds/opening.py.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sampling.loop import Choice, Step
from sampling.sampler import Sampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sampling.left_to_right import Reader


class Source(NamedTuple):
    """What writes the stories: a checkpoint, or exported graphs."""

    name: str
    tokenizer: "Tokenizer"
    histogram: dict  # of lengths
    max_len: int
    read_conditions: Callable[[list[str], "Tokenizer"], np.ndarray]
    step: Callable[[Sampler, np.ndarray | None], Step] | None  # None: fills no rows in any order
    choice: Callable[[Sampler, np.ndarray | None], Choice] | None  # an exported step has none
    reader: "Callable[[Sampler, np.ndarray | None], Reader] | None" = None  # writes from the left
    has_head: bool = False  # for drafts
    gap: dict = {}  # the Sampler that fills a gap best
    verifier: "Callable[[Sampler, np.ndarray | None], Reader] | None" = None  # of --verify_with
