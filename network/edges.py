"""What a trained encoder of pictures is given of each patch: edges and colours. A library of
image_encoders.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIRECTIONS, COLOURS = 8, 3
CELLS = 2  # across a patch
FEATURES = CELLS**2 * (DIRECTIONS + COLOURS)
NO_EDGE = 0.02  # energy below which a neighbourhood counts as flat


class EdgesAndColours(nn.Module):
    """Pictures (B, 3, size, size), values -1 to 1 -> (B, S, FEATURES), patch by patch.

    Of each cell, a quarter of a patch, the energy of edges in eight directions, as the root of its
    share of that of the neighbourhood (Dalal and Triggs, CVPR 2005, with energies for counts), and
    the mean colour. Nothing here is learned: from some thousand pictures a network that is given
    pixels takes far longer to find what these features are (docs/experiments.md).
    """

    def __init__(self, patch: int):
        super().__init__()
        self.cell = patch // CELLS
        slope = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3)
        # exact in every precision that a model may be turned into
        self.register_buffer("slopes", torch.stack([slope, slope.mT])[:, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        grey = F.pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across, down = (F.conv2d(grey, self.slopes.to(grey.dtype)) / 3).unbind(1)
        angles = [i * math.pi / DIRECTIONS for i in range(DIRECTIONS)]
        slopes = torch.stack([math.cos(a) * across + math.sin(a) * down for a in angles], 1)
        energy = F.avg_pool2d(slopes ** 2, self.cell)  # (B, 8, cells, cells)
        # outside there are no edges
        around = F.avg_pool2d(energy.sum(1, keepdim=True), 3, 1, 1)
        edges = 4 * (energy / (around + NO_EDGE)).clamp(min=1e-6).sqrt() - 1
        cells = torch.cat([edges, F.avg_pool2d(pictures, self.cell)], dim=1)
        count = cells.shape[-1] // CELLS  # of patches across
        return cells.unflatten(3, (count, CELLS)).unflatten(2, (count, CELLS)).permute(
            0, 2, 4, 1, 3, 5).reshape(len(cells), count**2, FEATURES)
