import pytest
import torch

from corpus.rows import TokenRows
from diffusion import DiscreteDiffusion
from training.loader import BatchLoader, BatchStream, step_seed


def test_batches_are_those_of_the_stream_and_depend_on_seed_and_step_alone(data_dir):
    rows, diffusion = TokenRows(data_dir), DiscreteDiffusion()
    loader = BatchLoader(rows, 512, 3, diffusion.corrupt_batch)
    stream = BatchStream(rows, 512, 3)
    cursors, masks = [loader.cursor], []
    for step in range(5):
        batch = loader.next()
        clean = torch.from_numpy(next(stream))
        again = diffusion.corrupt_batch(clean, torch.Generator().manual_seed(step_seed(3, step)))
        assert torch.equal(batch.corrupted.tokens, clean)
        assert torch.equal(batch.corrupted.noisy, again.noisy)
        assert batch.tokens == int((clean > 0).sum())
        assert batch.predicted == int(again.masked.sum())
        # the next batch is being prepared, yet the cursor is that of the one given
        assert loader.cursor == {"epoch": stream.epoch, "position": stream.position}
        assert loader.epochs == stream.epochs
        cursors.append(loader.cursor)
        masks.append(batch.corrupted.masked)
    # and it goes on from there
    later = BatchLoader(rows, 512, 3, diffusion.corrupt_batch, step=3, cursor=cursors[3])
    assert torch.equal(later.next().corrupted.masked, masks[3])


def test_an_error_in_the_background_reaches_the_caller(data_dir):
    calls = []

    def corrupt(tokens, generator):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("broken")
        return DiscreteDiffusion().corrupt_batch(tokens, generator)

    loader = BatchLoader(TokenRows(data_dir), 512, 0, corrupt)
    loader.next()
    with pytest.raises(ValueError, match="broken"):
        loader.next()


def test_seeds_differ_between_steps_and_processes():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(3)
             for rank in range(3)}
    assert len(seeds) == 27 and max(seeds) < 2**63
