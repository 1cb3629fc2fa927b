"""The settings of a sampler, and the presets. A library for whatever samples.

A sampler is an order (which positions first), a pace (how many in a step) and a way of hiding
tokens again. The order, and how many an adaptive pace takes, are decided inside the step (step.py),
for they need the network's probabilities; a planned pace and what is hidden again in paces.py.
"""

from cli import flag, require

from dataclasses import dataclass, replace

ORDERS = ("random", "confidence", "margin", "entropy", "left")
PLANNED_PACES = ("cosine", "linear", "first_hitting")
ADAPTIVE_PACES = ("threshold", "entropy_bound")
PACES = PLANNED_PACES + ADAPTIVE_PACES
REMASKS = ("none", "remdm_cap", "remdm_rescale", "remdm_confidence", "corrector")
MAX_STEPS = 100_000
# `generate.py --preset`, chosen from the tables of samplers in docs/results.md
PRESETS = {name: dict(steps=steps, order="random", temperature=1.0, top_p=0.9)
           for name, steps in (("fast", 16), ("balanced", 32), ("best", 64))}

# How a gap is filled best by a model that reads both sides: a token at a time, from the left
GAP = dict(order="left", pace="linear")


@dataclass(frozen=True)
class Sampler:
    """How to unmask. `check` raises UserError for values that mean nothing."""

    steps: int = flag(64, "steps of a story, at most")
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0 is all")
    top_p: float = flag(1.0, "draw among the likeliest tokens that together reach p")
    order: str = flag("random", "which position first: random (ancestral), or by the largest "
                                "probability (confidence), the largest lead over the second token "
                                "(margin) or the smallest entropy; or from the left")
    left_share: float = flag(0.0, "order left, of a joint model: share of its left-to-right mode; "
                                  "tokens are drawn from p(both sides)^(1 - s) p(left side)^s")
    carry: float = flag(1.0, "of a model with self-conditioning: how far it trusts what it "
                             "expected in the step before, which makes stories more likely and "
                             "more alike; 0 looks anew instead, which takes another evaluation")
    # cosine uncovers few tokens first, as in MaskGIT (arXiv 2202.04200)
    pace: str = flag("cosine", "tokens in a step: cosine (few at first), linear (alike), "
                               "first_hitting (random, as the process itself), or as many as the "
                               "network is sure of: threshold, entropy_bound")
    threshold: float = flag(0.9, "pace threshold: uncover every token at least this probable")
    gamma: float = flag(0.2, "pace entropy_bound: nats by which the joint entropy of the tokens of "
                             "a step may exceed their largest entropy")
    remask: str = flag("none", "hide tokens again: none, remdm_cap, remdm_rescale, "
                               "remdm_confidence or corrector")
    eta: float = flag(0.05, "how many: a share of the uncovered (remdm_cap, corrector), or of as "
                            "many as the process allows (remdm_rescale, remdm_confidence)")

    guidance: float = flag(1.0, "how much the condition counts: 0 not at all, 1 as trained, more "
                                "to stress it (classifier-free guidance, two evaluations a step)")

    def check(self) -> None:
        require(0 <= self.guidance < float("inf"), f"--guidance {self.guidance}: must be 0 or more")
        require(self.order in ORDERS, f"--order {self.order}: choose from {', '.join(ORDERS)}")
        require(0 <= self.left_share < 1, f"--left_share {self.left_share}: must be at least 0 and "
                                          "less than 1")
        require(not self.left_share or self.order == "left", "--left_share belongs to --order "
                "left: elsewhere what stands to the left is hidden; leave it out")
        require(not self.left_share or self.pace in PLANNED_PACES, "--left_share: an adaptive "
                "--pace takes places that it has no left side of; leave it out")
        require(0 <= self.carry <= 1, f"--carry {self.carry}: must be from 0 to 1")
        require(self.pace in PACES, f"--pace {self.pace}: choose from {', '.join(PACES)}")
        require(self.remask in REMASKS, f"--remask {self.remask}: choose from {', '.join(REMASKS)}")
        require(self.remask == "none" or self.pace in PLANNED_PACES,
                f"--remask {self.remask} hides tokens by a plan, which --pace {self.pace} has not: "
                f"choose one of {', '.join(PLANNED_PACES)}")
        require(0 < self.threshold <= 1, f"--threshold {self.threshold}: must lie in (0, 1]")
        require(0 <= self.gamma < float("inf"), f"--gamma {self.gamma}: must be 0 or more")
        require(0 <= self.eta <= 1, f"--eta {self.eta}: must lie in [0, 1]")
        require(1 <= self.steps <= MAX_STEPS,
                f"--steps {self.steps}: must be from 1 to {MAX_STEPS}")
        require(0 <= self.temperature < float("inf"),
                f"--temperature {self.temperature}: must be 0 (greedy) or more")
        require(self.top_k >= 0, f"--top_k {self.top_k}: must be 0 (off) or more")
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must lie in (0, 1]")

    @property
    def drawing(self) -> "Sampler":
        """For what only draws: how many steps is the writer's business, and a draft head that
        drafts alone (see left_to_right.py) has none, which `check` refuses elsewhere."""
        return replace(self, steps=max(self.steps, 1))

    @property
    def evaluations_per_step(self) -> int:
        """Of a row with a condition."""
        return 1 if self.guidance in (0, 1) else 2

    def check_model(self, carries: bool) -> None:
        """Refuses what a model without self-conditioning knows nothing of."""
        require(carries or self.carry == 1, f"--carry {self.carry:g}: this model has no "
                "self-conditioning and is told nothing; leave it out")

    def check_used(self, given: set[str]) -> None:
        """Refuses flags that were given and would change nothing."""
        for name, used, by in (("carry", self.order != "left", "an --order other than left"),
                               ("threshold", self.pace == "threshold", "--pace threshold"),
                               ("gamma", self.pace == "entropy_bound", "--pace entropy_bound"),
                               ("eta", self.remask != "none", "a --remask other than none")):
            require(used or name not in given, f"--{name} belongs to {by}: add it, or leave "
                                               f"--{name} out")
