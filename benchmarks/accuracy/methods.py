"""Ways to prune a classifier without retraining: ours, its parts, and its peers, each at its best published setting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx

from benchmarks.accuracy.case import ENGINE, Case, Scores
from benchmarks.accuracy.convolutions import torch_pruning
from benchmarks.accuracy.kwon import rearranged, tuned
from benchmarks.accuracy.rival import Ranking, pruned
from benchmarks.scoring.rivals import magnitude, random, squared, torch_pruning_taylor
from benchmarks.tasks import Task
from optin_deploy.errors import InfeasibleBudget
from optin_deploy.exporters import exporter
from optin_deploy.feeds.rows import MASK
from optin_deploy.network.graph import Network
from optin_deploy.planning.widths import Choice
from optin_deploy.pruning.tokens import schedules
from optin_deploy.structure.tokens import TokenStream, most_merged

TAU = 0.775
"""Part of the savings that tokens bring: the paper names 70 to 85%."""
Method = Callable[[Case, float], Network | onnx.ModelProto]
"""(case, share of the MACs that stays) -> pruned network; a file's if it is another tool's."""
PUBLISHED = Choice(align=1, allocation="paper")
"""One ranking of all units of a kind, by score per cost."""


def ours(case: Case, flops: float) -> Network:
    """Trajectory scores, allocation by error curves, compensation."""
    return case.product(flops, "curves")


def ours_with_tokens(case: Case, flops: float) -> Network:
    """The same, and tokens merged under the same budget, those of texts dropped."""
    return case.product(flops, "curves", tokens=True)


def tokens_alone(case: Case, flops: float) -> Network:
    """All widths, and tokens merged by our schedules, which compensation makes up for."""
    return case.repaired({}, case.first_within(flops, schedules(case.ready, np.linspace(1, 0, 101))))


def tome(case: Case, flops: float) -> Network:
    """Token Merging as published: the same number of tokens in every block, and nothing else."""
    return case.merging(flops, (every_block(case.stream, count) for count in range(case.stream.tokens)))


def every_block(stream: TokenStream, count: int) -> tuple[int, ...]:
    """Merges of so many tokens in each block, or of as many as can go."""
    merges, left = list[int](), stream.tokens
    for _ in stream.blocks:
        merges.append(min(count, most_merged(left, stream.protected)))
        left -= merges[-1]
    return tuple(merges)


def ours_uniform(case: Case, flops: float) -> Network:
    """Trajectory scores, equal widths, compensation."""
    return case.product(flops, "uniform")


def optin(case: Case, flops: float) -> Network:
    """The paper's: trajectory scores and its global search, nothing compensated.

    The scores are the sketch's, whose rank correlation with exact ones is above 0.99 (scoring_accuracy).
    """
    return case.sliced(case.plan(case.scores.scores, flops, PUBLISHED))


def optin_with_tokens(case: Case, flops: float) -> Network:
    """The paper's with tokens (its tau): merging saves most of what is to be saved, its search cuts the rest."""
    every = [every_block(case.stream, count) for count in range(case.stream.tokens)]
    try:
        merges = case.first_within(1 - TAU * (1 - flops), every)
    except InfeasibleBudget:
        merges = every[-1]
    keep = case.plan(case.scores.scores, flops, PUBLISHED, merges)
    return case.sliced(keep, merges=merges)


def kwon(case: Case, flops: float) -> Network:
    """Kwon et al. 2022 complete: Fisher of the labels, global search, rearrangement, tuned masks."""
    fisher = importance("fisher", case)
    keep = rearranged(case.plan(fisher, flops, PUBLISHED), case.gradients)
    teacher = case.plan(fisher, flops**0.5, PUBLISHED)
    network = tuned(case.subject, keep, case.batches, teacher=teacher, first_token=MASK in case.batches[0])
    return case.sliced(keep, network)


def importance(name: str, case: Case) -> Scores:
    """Importance of the units by one of the other methods."""
    if name == "fisher":
        return squared(case.gradients)
    if name == "random":
        return random(case.model, case.subject, case.batches, case.loss, seed=case.seed)
    make = {"magnitude": magnitude, "taylor": torch_pruning_taylor}[name]
    return case.shared(name, lambda: make(case.model, case.subject, case.batches, case.loss))


def rival(name: str, case: Case, flops: float) -> Network:
    """Another importance, equal shares, nothing compensated."""
    return case.sliced(case.equal_shares(importance(name, case), flops))


def rival_compensated(name: str, case: Case, flops: float) -> Network:
    """Another importance, equal shares, our compensation: what the score alone is worth."""
    return case.repaired(case.equal_shares(importance(name, case), flops, exporter(ENGINE).align))


RANKINGS = {
    "sentiment": Ranking(wanda=True),
    "r8": Ranking(wanda=True),
    "cifar10": Ranking(wanda=True),
    "cifar10-resnet": Ranking(everywhere=True),
}
"""Rankings of onnxsim by task: those that are nearest to the dense outputs on the calibration rows of seed 0 at 40% of
the MACs (`python -m benchmarks.accuracy.rankings`)."""


def onnxsim(case: Case, flops: float) -> onnx.ModelProto:
    """onnxsim's cut of what torch exports, at its best ranking, with its ridge regression on the same rows."""
    return pruned(case, flops, RANKINGS.get(case.task, Ranking(wanda=True)))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, tokens": ours_with_tokens,
    "ours, tokens alone": tokens_alone,
    "ours, uniform": ours_uniform,
    "onnxsim": onnxsim,
    "Token Merging": tome,
    "OPTIN": optin,
    "OPTIN, tokens": optin_with_tokens,
    "Kwon et al.": kwon,
    "Taylor (Torch-Pruning)": partial(rival, "taylor"),
    "Torch-Pruning, Taylor": partial(torch_pruning, "taylor"),
    "Torch-Pruning, L1": partial(torch_pruning, "l1"),
    "magnitude": partial(rival, "magnitude"),
    "random": partial(rival, "random"),
    "Fisher + ours": partial(rival_compensated, "fisher"),
    "random + ours": partial(rival_compensated, "random"),
}
PEERS = (
    "onnxsim",
    "Token Merging",
    "OPTIN",
    "OPTIN, tokens",
    "Kwon et al.",
    "Taylor (Torch-Pruning)",
    "Torch-Pruning, Taylor",
    "Torch-Pruning, L1",
    "magnitude",
    "random",
)
"""Published methods; the others are ours or hold parts of ours."""
OF_IMAGES = ("ours, tokens alone", "Token Merging", "OPTIN, tokens")
"""Methods that need a fixed number of tokens."""
OWN_PRUNER = ("Torch-Pruning, Taylor", "Torch-Pruning, L1")
"""Methods of Torch-Pruning's own pruner, which is tried on convolutional networks alone."""
OF_CONVOLUTIONS = ("ours", "ours, uniform", "onnxsim", "OPTIN", *OWN_PRUNER)
"""Methods for convolutional networks."""
ONE_SEED = ("onnxsim",)
"""Methods that get the first calibration seed only: they take minutes a cell."""
ABLATIONS = ("Fisher + ours", "random + ours")
"""What the score alone is worth; only on demand."""


def fits(method: str, task: Task) -> bool:
    """Whether a method is for such a network."""
    if task.inputs is not None:
        return method in OF_CONVOLUTIONS
    return method not in OWN_PRUNER and (method not in OF_IMAGES or task.test[0].image is not None)
