"""TODO"""

import numpy as np

# First numbers of the seeds, so that no two uses of randomness share a stream. (3 and 4 are those
# of the evaluation masks in diffusion.py, 7 is that of quality.py.)
LENGTH_STREAM, NOISE_STREAM, HITTING_STREAM, REMASK_STREAM, LIMIT_STREAM = 1, 2, 5, 6, 8


def step_noise(seed: int, row: int, step: int, length: int) -> np.ndarray:
    """(2, length) uniforms in [0, 1): for the order and for the token of every position.

    A function of (seed, row, step) alone, so that a row's story does not depend on its batch.
    """
    return np.random.default_rng([NOISE_STREAM, seed, row, step]).random((2, length))


# First numbers of the seeds of the evaluation masks, like those of sampler.py.
SHIFT_STREAM, MASK_STREAM = 3, 4
GAP_STREAM = 7  # first number of a seed, see sampler.py
