"""The kinds of model there are, and which one a run or a checkpoint is of. A library.

    kind = kind_of(checkpoint)      # of one that kinds/checkpoints.py read
    kind = kind_of_run(config)      # a TrainConfig
"""

from cli import UserError, require

from collections.abc import Callable

from block_diffusion import JointDiffusion
from diffusion import DiscreteDiffusion
from kinds.autoregressive import Autoregressive
from kinds.conditional import ConditionalDiffusion, ConditionalJoint
from kinds.drafts import DraftTraining
from kinds.kind import Kind

KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (DiscreteDiffusion, ConditionalDiffusion, Autoregressive,
                                 JointDiffusion, ConditionalJoint)}


def trained_kinds() -> list[type[Kind]]:
    """Those that a run can be of: also what goes on with a model without changing its kind."""
    return [*KINDS.values(), DraftTraining]


def kind_of(checkpoint: dict) -> Kind:
    """That of a checkpoint that load_checkpoint read."""
    return KINDS[checkpoint["kind"]].of_checkpoint(checkpoint)


def kind_of_run(config) -> Kind:
    """That of a run with the --objective and --stage of these settings (a TrainConfig)."""
    known = objectives()
    require(config.objective in known, f"--objective {config.objective}: choose from "
                                       f"{', '.join(known)}")
    kinds = [kind for kind in trained_kinds() if config.objective in kind.objectives]
    for kind in kinds:
        if config.stage in kind.stages:
            return kind.of_run(config)
    raise UserError(f"--stage {config.stage}: the {kinds[0].title} takes no condition")


def objectives() -> list[str]:
    """The values of --objective."""
    return list(dict.fromkeys(name for kind in trained_kinds() for name in kind.objectives))


def kinds_that(test: Callable[[type[Kind]], bool]) -> tuple[str, ...]:
    """Names of the kinds that pass, for load_checkpoint and find_checkpoint."""
    return tuple(name for name, kind in KINDS.items() if test(kind))
