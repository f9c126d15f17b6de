"""What kinds of groups are called; light, as whoever only tells of groups needs nothing else."""

from __future__ import annotations

KINDS = ("heads", "groups", "queries", "neurons", "channels", "qk-width", "v-width")
"""Labels of groups, for people, pools of ranking and alignment; no other code depends on them."""
TOKENS = "tokens"
"""What may be merged, as `--units` calls it: tokens are in no group."""
