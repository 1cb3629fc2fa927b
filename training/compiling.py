"""torch.compile for the blocks of a network, where it works. A library: training/building.py and
the benchmark of a training step compile with it.
"""

import shutil
import sys

import torch

from corpus.tokens import EOS
from model import DiffusionTransformer

# Share of the activations that the compiler keeps for the backward pass; what is cheap it works out
# again. At 1.0, 0.6, 0.5, 0.4 and 0 a step of the small model (16 x 256 tokens, one thread of a
# Zen 4) had its peak at 1.34, 1.16, 1.10, 1.08 and 0.97 GB; 1.0 and 0.6 took equally long, 0.4 a
# twentieth more.
MEMORY_BUDGET = 0.5
# Of one block's code: the first block, those in the middle and the last one, with gradient and
# without, causal and behind other tokens' keys. The compiler's own limit is 8.
VARIANTS = 64


def compile_blocks(model: DiffusionTransformer, device: torch.device, length: int) -> str | None:
    """torch.compile for the blocks of a model; returns None, or why it has to stay eager.

    The blocks share their code, so those that are used alike share what is compiled; rows and
    length are symbols in it, so that the batches' many shapes need no second compilation. It is
    tried out here, forward and backward, before a run depends on it.
    """
    if sys.platform == "win32" or device.type == "mps":
        return "torch.compile does not work on Windows or MPS"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is here"
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    functorch_config.activation_memory_budget = MEMORY_BUDGET
    dynamo_config.recompile_limit = VARIANTS
    for block in model.all_blocks:
        block.compile(dynamic=True)
    training = model.training
    try:
        # Sizes that nothing else in the network has: the compiler takes equal ones for the same.
        for rows, width in ((7, length), (11, max(1, length - 16))):
            tokens = torch.full((rows, width), EOS, device=device)
            encoder = getattr(model, "encoder", None)
            given = [tokens, torch.ones(rows, device=device)]
            how = {}
            if encoder:
                given.append(model.train().encode(encoder.example(rows).to(device)))
            elif model.picks:
                how["at"] = torch.arange(1, rows * width, 2, device=device)
            if model.self_conditioning:
                with torch.no_grad():
                    model.train().hidden(*given, **how)
            model.train().hidden(*given, **how).sum().backward()
    except Exception as error:  # a compiler has many ways to fail
        for block in model.all_blocks:
            block._compiled_call_impl = None
        return f"torch.compile failed here ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(training)
        model.zero_grad()
    return None


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
