"""The operator Snake of the domain my.domain: how it is computed, and that it leaves axes as they are."""

from __future__ import annotations

from optin_deploy.network.operators.elementwise import unary

ROWS = (unary("Snake", lambda x: x + x.sin() ** 2, domain="my.domain"),)
