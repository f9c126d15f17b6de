"""Score the units of a network: the published method and the fast sketch behind one function."""

from __future__ import annotations

from optin_deploy.scoring.features import PAPER, Features
from optin_deploy.scoring.parts import PartsLeft, Worker
from optin_deploy.scoring.settings import SCORERS, ScoreSettings
from optin_deploy.scoring.terms import Terms
from optin_deploy.scoring.unit_job import score_units
from optin_deploy.scoring.unit_scores import UnitScores

__all__ = [
    "PAPER",
    "SCORERS",
    "Features",
    "PartsLeft",
    "ScoreSettings",
    "Terms",
    "UnitScores",
    "Worker",
    "score_units",
]
