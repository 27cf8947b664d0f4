"""The study's findings from those of the units: comparisons seed by seed, in numbers and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.plan import METHODS, PLANS, SOLVING, VANILLA, Plan, unit
from benchmarks.tables import table, times
from benchmarks.timing import Spread, ratio
from dtr_kernels.files import expecting, read_json
from dtr_kernels.quoting import quoted

DOCS = Path("docs/study")
NOT_RUN = "The study has not been run: `make study`."


@dataclass(frozen=True)
class Change:
    """A method against vanilla: the relative difference of each seed, negative if the method is lower."""

    each: tuple[float, ...]

    @classmethod
    def of(cls, method: Sequence[float], vanilla: Sequence[float]) -> Change:
        return cls(tuple(a / b - 1 for a, b in zip(method, vanilla, strict=True)))

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def verdict(self) -> str:
        """The number of seeds in which the method is lower or higher, in words."""
        lower, higher = sum(change < 0 for change in self.each), sum(change > 0 for change in self.each)
        if len(self.each) in (lower, higher):
            return f"{'lower' if lower else 'higher'} in every seed"
        return f"lower in {lower} of {len(self.each)} seeds"

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({min(self.each):+.1%} to {max(self.each):+.1%}), {self.verdict}"


def collect(plan: Plan, found: Mapping[str, Mapping[str, Any]], bounds: Sequence[int]) -> dict[str, Any]:
    """Return everything that a page and the README are made from, as JSON.

    Args:
        plan: the size of the study.
        found: the findings of each unit, with its environment.
        bounds: of the clusters.
    """
    seeds = range(plan.seeds)
    specialists = [[found[unit(f"specialist {k}", seed)]["losses"] for k in range(plan.clusters)] for seed in seeds]
    return {
        "plan": asdict(plan),
        "environment": found["seconds"]["environment"],  # of the unit that depends most on the machine
        "commits": commits_of(found),
        "bounds": list(bounds),
        "real": {name: value for name, value in found["real"].items() if name != "environment"},
        "methods": of_methods(plan, found, METHODS),
        "specialists": [[_rounded(losses) for losses in of_seed] for of_seed in specialists],
        "transfer": [_rounded(found[unit("transfer", seed)]["distance"]) for seed in seeds],
        "affinity": {
            **{name: found["affinity"][name] for name in ("steps", "timesteps")},
            "matrix": [_rounded(row) for row in found["affinity"]["matrix"]],
        },
    }


def of_methods(plan: Plan, found: Mapping[str, Mapping[str, Any]], methods: Iterable[str]) -> dict[str, Any]:
    """Return the findings of each method's runs, seed by seed, and the time of its steps."""
    runs = {method: [found[unit(method, seed)] for seed in range(plan.seeds)] for method in methods}
    return {
        method: {
            "losses": [_rounded(run["losses"]) for run in of_seeds],
            "distance": [run["distance"] for run in of_seeds],
            "distance of as many": [run["distance of as many"] for run in of_seeds],
            "recognised": [run["recognised"] for run in of_seeds],
            "seconds": _rounded(found["seconds"]["seconds"][method]),
        }
        for method, of_seeds in runs.items()
    }


def commits_of(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the commits that the units ran on."""
    return sorted({_commit(of_unit["environment"]) for of_unit in found.values()})


def _commit(environment: Mapping[str, Any]) -> str:
    if environment["commit"] is None:
        return "outside of git"
    return environment["commit"][:7] + (" and uncommitted changes" if environment["uncommitted changes"] else "")


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def losses_of(study: Mapping[str, Any], method: str) -> list[float]:
    """Return the mean denoising loss over the timesteps, for each seed."""
    return mean_losses(study["methods"][method]["losses"])


def mean_losses(of_seeds: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each seed's losses."""
    return [sum(losses) / len(losses) for losses in of_seeds]


def changes(study: Mapping[str, Any], method: str) -> tuple[Change, Change]:
    """Return how a method's losses and distances differ from vanilla's."""
    distances = (study["methods"][each]["distance"] for each in (method, VANILLA))
    return Change.of(losses_of(study, method), losses_of(study, VANILLA)), Change.of(*distances)


def step_time(study: Mapping[str, Any], method: str) -> Spread:
    """Return the time of a training step over that of vanilla, and the percentiles of single steps' ratios."""
    by_step = ratio(study["methods"][method]["seconds"], study["methods"][VANILLA]["seconds"])
    return Spread(step_seconds(study, method) / step_seconds(study, VANILLA), by_step.p20, by_step.p80)


def step_seconds(study: Mapping[str, Any], method: str) -> float:
    """Return the seconds of an average step: the median, with Nash-MTL's solving step counted as one in 25."""
    seconds = study["methods"][method]["seconds"]
    median = Spread.of(seconds).median
    return median + (seconds[SOLVING] - median) / len(seconds)


def loss_gaps(study: Mapping[str, Any]) -> torch.Tensor:
    """Return vanilla's negative transfer gap in each interval, relative to its denoising loss there, [seeds, K].

    It is negative if the specialist's loss is lower: negative transfer.
    """
    shared = torch.tensor(study["methods"][VANILLA]["losses"], dtype=torch.float64)
    gaps = []
    for of_seed, losses in zip(study["specialists"], shared, strict=True):
        parts = losses.split([len(of_interval) for of_interval in of_seed])
        own = [torch.tensor(of_interval, dtype=torch.float64).mean() for of_interval in of_seed]
        gaps.append(torch.stack([mine / part.mean() - 1 for mine, part in zip(own, parts, strict=True)]))
    return torch.stack(gaps)


def affinity_falls(study: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean cosine of neighbouring timesteps, and of timesteps at least half of the process apart."""
    matrix = torch.tensor(study["affinity"]["matrix"], dtype=torch.float64)
    count = len(matrix)
    apart = (torch.arange(count)[:, None] - torch.arange(count)).abs()
    return matrix[apart == 1].mean().item(), matrix[apart >= count // 2].mean().item()


def as_table(study: Mapping[str, Any]) -> str:
    """Write a table with one row for each method."""
    rows = [["", "denoising loss", "against vanilla", "Frechet distance", "against vanilla", "recognised", "a step"]]
    for method, found in study["methods"].items():
        loss, distance = ("", "") if method == VANILLA else map(str, changes(study, method))
        losses, distances = over_seeds(losses_of(study, method), "{:.4f}"), over_seeds(found["distance"], "{:.2f}")
        recognised = over_seeds(found["recognised"], "{:.1%}")
        rows.append([method, losses, loss, distances, distance, recognised, _step(study, method)])
    return table(rows)


def over_seeds(values: Sequence[float], form: str) -> str:
    """Format the mean, the least and the most over seeds."""
    mean, least, most = (form.format(value) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def _step(study: Mapping[str, Any], method: str) -> str:
    if method == VANILLA:
        return f"{step_seconds(study, method) * 1e3:.3g} ms"
    return times(step_time(study, method))


def sentences(study: Mapping[str, Any]) -> list[str]:
    """Write the findings as five sentences."""
    plan, real = study["plan"], study["real"]
    near, far = affinity_falls(study)
    gaps = loss_gaps(study)
    by_distance = torch.tensor(study["transfer"], dtype=torch.float64)
    vanilla = over_seeds(study["methods"][VANILLA]["distance of as many"], "{:.1f}")
    return [
        f"**Routing.** {_compared(study, ['+DTR (block)', '+DTR (branch)', '+R-TR'])}",
        f"**Weighting.** {_compared(study, ['+UW', '+PCGrad', '+Nash', '+Min-SNR', '+u(t)'])}",
        f"**Both.** {_compared(study, ['+DTR+UW', '+DTR+PCGrad', '+DTR+Min-SNR'])} {_best(study)} "
        f"({real['as many']} samples of vanilla are at {vanilla}, as many held-out real digits at "
        f"{real['distance of as many']:.1f}.)",
        f"**Task affinity (O1).** Gradients at timesteps {plan['affinity_every']} apart have a cosine of {near:.2f}, "
        f"those half of the process or more apart {far:.2f}.",
        f"**Negative transfer (O2).** By denoising loss specialists are better in every seed "
        f"{_intervals(study, (gaps < 0).all(0))} (negative transfer) and worse in every seed "
        f"{_intervals(study, (gaps > 0).all(0))}; by the distance of samples they are better "
        f"{_intervals(study, (by_distance < 0).all(0))} and worse {_intervals(study, (by_distance > 0).all(0))}.",
    ]


def _best(study: Mapping[str, Any]) -> str:
    """Name the method whose samples are closest in every seed, if there is one."""
    seeds = zip(*(found["distance"] for found in study["methods"].values()), strict=True)
    best = {list(study["methods"])[distances.index(min(distances))] for distances in seeds}
    if len(best) > 1:
        return "No method has the smallest distance in every seed."
    return f"{best.pop()} has the smallest distance in every seed."


def _compared(study: Mapping[str, Any], methods: Sequence[str]) -> str:
    parts = []
    for method in (method for method in methods if method in study["methods"]):  # an older study lacks newer ones
        loss, distance = changes(study, method)
        parts.append(
            f"{method}: loss {loss.mean:+.1%} ({loss.verdict}), distance {distance.mean:+.1%} ({distance.verdict}), "
            f"{step_time(study, method).median:.2f}x the time of a step"
        )
    return "; ".join(parts) + "."


def _intervals(study: Mapping[str, Any], which: torch.Tensor) -> str:
    """Write intervals as their first and last timesteps, 0 being the clean end."""
    bounds = study["bounds"]
    chosen = [f"{bounds[k]}..{bounds[k + 1] - 1}" for k in range(len(which)) if which[k]]
    return "at t " + ", ".join(chosen) if chosen else "nowhere"


def setup(study: Mapping[str, Any]) -> str:
    """Say which models were trained, on which data, where and when."""
    plan, where, real = study["plan"], study["environment"], study["real"]
    model = f"a DiT of {plan['hidden_size']} channels and {plan['depth']} blocks"
    images = f"{plan['batch_size']} images of {plan['size']} x {plan['size']}"
    return (
        f"{len(study['methods'])} ways to train {model}, {plan['steps']} steps of {images}, {plan['seeds']} seeds, "
        f"K {plan['clusters']}; {real['training images']} real digits to train on and {real['held-out images']} held "
        f"out; {where['device']}, torch {where['torch']}, commit {', '.join(study['commits'])}, "
        f"{str(where['date'])[:10]}"
    )


def committed(root: Path) -> list[dict[str, Any]]:
    """Return the studies whose figures are in a checkout's docs, the largest first.

    Raises:
        ValueError: naming the file, if a file holds anything else.
    """
    paths = [root / DOCS / f"{name}.json" for name in reversed(PLANS)]
    return [read(path, markdown) for path in paths if path.exists()]


def read(path: Path, page: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Read a study from which its page can be made.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    advice = "restore it from git, or make it anew with python -m benchmarks study"
    with expecting("a study of this version", path, advice):
        study = read_json(path)
        page(study)
        if study["plan"]["name"] != path.stem:
            raise ValueError(f"it is named after another study than {quoted(study['plan']['name'])}")
        return study


def readme_block(root: Path) -> str:
    """Write the README's block on the largest committed study; or say that there is none."""
    for study in committed(root):
        methods = [method for method in study["methods"] if method != VANILLA]
        found = (
            f"{method} {changes(study, method)[1].mean:+.0%}, {step_time(study, method).median:.2f}x"
            for method in methods
        )
        path = f"{DOCS}/{study['plan']['name']}"
        said = "Frechet distance of samples against the plain recipe's, and the time of a step: "
        picture = f"![All of the study on one page]({path}.png)"
        return f"{said}{'; '.join(found)}. {setup(study)} ([all figures]({path}.md)).\n\n{picture}"
    return NOT_RUN


def methods_block(root: Path) -> str:
    """Write the block of ``docs/methods.md``: each method of the largest committed study against vanilla, and the
    methods that it lacks."""
    for study in committed(root):
        rows = [["against vanilla", "denoising loss", "Frechet distance", "time of a step"]]
        for method in list(study["methods"])[1:]:  # without vanilla
            changed = (f"{change.mean:+.1%}, {change.verdict}" for change in changes(study, method))
            rows.append([method, *changed, _step(study, method)])
        parts = [f"{setup(study)} ([all figures](study/{study['plan']['name']}.md)):", table(rows)]
        if missing := [method for method in METHODS if method not in study["methods"]]:
            parts.append(f"Newer than that run, and not in it: {', '.join(missing)}.")
        return "\n\n".join(parts)
    return NOT_RUN


def markdown(study: Mapping[str, Any]) -> str:
    """Write the page beside the picture."""
    real = study["real"]
    return (
        "\n\n".join(
            [
                "# What the methods do on real digits",
                f"{setup(study)}. Made by `{study['environment']['command']}`.",
                f"![The study on one page]({study['plan']['name']}.png)",
                "\n".join(f"- {sentence}" for sentence in sentences(study)),
                "## Each method",
                as_table(study),
                _METHOD.format(
                    accuracy=f"{real['accuracy']:.1%}",
                    few=real["as many"],
                    distance=f"{real['distance of as many']:.1f}",
                ),
            ]
        )
        + "\n"
    )


_METHOD = """\
## How to read this

- Every method trains from the same weights, on the same images, timesteps and noise, for as many steps; only the
  routing and the weighting differ. Differences are therefore taken seed by seed; in brackets are the least and the most
  of them. With so few seeds "in every seed" is a hint and no proof, and among so many methods some agree by chance.
- The moving average of the weights is judged. The denoising loss is the mean squared error of the predicted velocity on
  held-out images, over evenly spaced timesteps, with the same noise for every model.
- The Frechet distance compares samples with the training images, by 64 activations of a classifier trained on those
  (its accuracy on held-out images: {accuracy}). It grows as images get fewer, so the {few} held-out real images, at
  {distance}, can only be compared with as many samples. "Recognised" are samples that the classifier takes for the
  class that was asked for.
- A specialist is trained on one interval alone, for as many steps as the shared model takes for all of them. The
  negative transfer gap is the quality with the specialist in its interval minus that of the shared model alone, lower
  being better: a negative gap is negative transfer.
- Task affinity: cosines of the gradients of the loss at two timesteps, each over all training images with noise of its
  own, averaged over three moments of a vanilla training.
- Random routing has a mask of its own for every seed, and runs through plain PyTorch.
- The time of a step is the median of 25 at the end, in which all methods take turns; the one that solves for Nash-MTL's
  weights, as one in 25 does, is averaged in. The range is from p20 to p80 of single steps. Gradient surgery uses engine
  "per_cluster"."""
