"""What kinds of groups are called; light, as whoever only tells of groups needs nothing else."""

from __future__ import annotations

KINDS = ("heads", "groups", "queries", "neurons", "channels", "qk-width", "v-width")
"""Labels of groups, for people, pools of ranking and alignment; no other code depends on them."""
DEFAULT_KINDS = ("heads", "groups", "neurons", "channels")
"""What is cut where nothing is said; widths of heads, and queries within a group, only where they are named."""
TOKENS = "tokens"
"""What may be merged, as `--units` calls it: tokens are in no group."""
