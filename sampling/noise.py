"""Random numbers that depend on their purpose, never on the batch. A library for all that draws."""

import numpy as np

# First numbers of the seeds, so that no two uses of randomness share a stream.
LENGTH_STREAM, NOISE_STREAM, HITTING_STREAM, REMASK_STREAM, LIMIT_STREAM = 1, 2, 5, 6, 8
SHIFT_STREAM, MASK_STREAM = 3, 4  # of the masks of an evaluation
GAP_STREAM = 7  # of the sentences that an evaluation hides
BLOCK_STREAM, VERIFY_STREAM, CAUSAL_STREAM = 9, 10, 11  # blocks, drafts, token by token


def step_noise(seed: int, row: int, step: int, length: int) -> np.ndarray:
    """(2, length) uniforms in [0, 1): for the order and for the token of every position.

    A function of (seed, row, step) alone, so that a row's story does not depend on its batch.
    """
    return np.random.default_rng([NOISE_STREAM, seed, row, step]).random((2, length))
