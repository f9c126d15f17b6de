"""Which ranking of onnxsim is its best on a task: the nearest to the dense outputs on calibration rows of one seed.

KL divergence at 40% of the MACs, after its ridge regression on the same rows; test rows are never looked at.
Run: python -m benchmarks.accuracy.rankings sentiment r8 cifar10; write what it finds into `methods.RANKINGS`.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from benchmarks.accuracy.__main__ import made_case
from benchmarks.accuracy.case import OUTPUT
from benchmarks.accuracy.outputs import divergence, outputs_of
from benchmarks.accuracy.rival import Ranking, pruned
from benchmarks.tasks import TASKS
from optin_deploy.pruning.networks import find_in
from optin_deploy.reporting.terminal import quiet_libraries

FLOPS, SEED, ROWS = 0.4, 0, 1024


def main() -> None:
    """Try all rankings on each task, and print them and the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    quiet_libraries()
    for name in parser.parse_args().tasks:
        task = TASKS[name](Path("out/tasks"))
        case = made_case(task, find_in(task.model, task.inputs), SEED, min(ROWS, len(task.calibration) // 2))
        dense = outputs_of(case.found.network, OUTPUT, case.batches, case.seq_len)
        found = []
        for wanda, norm, everywhere in product((False, True), ("l2", "l1"), (False, True)):
            ranking = Ranking(wanda, norm, everywhere)
            given = outputs_of(pruned(case, FLOPS, ranking), OUTPUT, case.batches, case.seq_len)
            found.append((divergence(dense, given), str(ranking)))
            print(name, *found[-1], flush=True)
        print(name, "best:", *min(found), flush=True)


if __name__ == "__main__":
    main()
