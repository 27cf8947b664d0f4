"""The methods that the study compares, and the sizes at which it does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

VANILLA = "vanilla"

#: Changes to the recipe by method. All methods have the same steps, batches and noise.
METHODS: dict[str, dict[str, str]] = {
    VANILLA: {"routing": "none"},
    "+R-TR": {"routing": "random"},
    "+DTR (block)": {"routing": "dtr", "scope": "block"},
    "+DTR (branch)": {"routing": "dtr", "scope": "branch"},
    "+UW": {"routing": "none", "weighting": "uw"},
    "+PCGrad": {"routing": "none", "weighting": "pcgrad"},
    "+Nash": {"routing": "none", "weighting": "nash"},
    "+Min-SNR": {"routing": "none", "weighting": "min-snr"},
    "+u(t)": {"routing": "none", "weighting": "edm2"},
    "+DTR+UW": {"routing": "dtr", "weighting": "uw"},
    "+DTR+PCGrad": {"routing": "dtr", "weighting": "pcgrad"},
    "+DTR+Min-SNR": {"routing": "dtr", "weighting": "min-snr"},
}

#: Nash-MTL solves for new weights once in this number of steps. As many steps are timed, after two for warm-up, so the
#: last but one solves.
TIMED_STEPS, WARM_UP = 25, 2
SOLVING = -WARM_UP


def unit(what: str, seed: int) -> str:
    """Return the name of a piece of work that is done for every seed."""
    return f"{what}, seed {seed}"


@dataclass(frozen=True)
class Plan:
    """The size of a study.

    Attributes:
        seeds: number of trainings of everything; seed s has the same batches and noise for every method.
        steps, batch_size, learning_rate, precision, size, hidden_size, depth, num_heads: as in ``Recipe``.
        clusters: K, of the weightings and of the specialists.
        samples: images drawn from each model, a multiple of ten.
        sampling_steps: of DDIM.
        loss_every, affinity_every: distance of the timesteps at which losses, and gradients, are computed.
        epochs: of the classifier's training.
    """

    name: str
    seeds: int
    steps: int
    batch_size: int
    samples: int
    sampling_steps: int
    loss_every: int
    affinity_every: int
    clusters: int = 5
    size: int = 8
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    learning_rate: float = 2e-3
    precision: str = "fp32"
    epochs: int = 40

    def settings(self) -> dict[str, Any]:
        """Return the settings that the recipes of all models share."""
        not_of_recipes = ("name", "seeds", "samples", "sampling_steps", "loss_every", "affinity_every", "epochs")
        return {name: value for name, value in asdict(self).items() if name not in not_of_recipes}


PLANS = {
    plan.name: plan
    for plan in (
        Plan("quick", 2, 12, 20, 100, 4, 100, 500, hidden_size=32, depth=2, num_heads=2, epochs=2),
        Plan("cpu", 3, 400, 128, 1000, 25, 20, 20),
        # A larger model on larger images. It has no figures: no GPU has run it yet.
        Plan(
            "cuda",
            *(3, 2000, 256, 2000, 50, 10, 20),
            size=32,
            hidden_size=384,
            depth=12,
            num_heads=6,
            learning_rate=5e-4,
            precision="bf16",
        ),
    )
}
