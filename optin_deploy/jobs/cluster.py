"""Score on a Ray cluster: the same parts and files, its workers on many machines that share the output folder."""

from __future__ import annotations

import os
from typing import Any

from optin_deploy.common.validation import whole_number
from optin_deploy.errors import MissingDependency
from optin_deploy.jobs.stages import ScoreRequest
from optin_deploy.scoring.parts import MOST_WORKERS, Worker

RETRIES = 3
"""Restarts of a worker whose machine or process is lost; what it had finished stays."""


def score_on_ray(request: ScoreRequest, workers: int) -> bool:
    """Run `workers` workers on the cluster of RAY_ADDRESS, or on this machine.

    All of them need the same paths of model, data and output folder.

    Returns: True if finished scores were found.
    Raises: MissingDependency; BadInput: no worker; what a worker raises.
    """
    whole_number(workers, "--ray", 1, MOST_WORKERS)
    try:
        import ray
    except ImportError as err:
        raise MissingDependency("ray is not installed. Run: pip install 'optin-deploy[ray]'") from err

    def work(index: int) -> bool:
        return request.run(Worker(index, workers))

    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    try:
        remote: Any = ray.remote(max_retries=RETRIES)(work)
        return all(ray.get([remote.remote(index) for index in range(workers)]))
    except ray.exceptions.RayTaskError as err:
        raise err.cause if isinstance(err.cause, Exception) else err from err
    finally:
        if started:
            ray.shutdown()
