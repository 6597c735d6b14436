"""Colours of groups of runs, the same in every chart. No two groups share one, and a chart shows no more
groups than there are.

The first four are Okabe and Ito's, which the colour-blind tell apart; all have a contrast of 3 or more to
white and to the dark paper of the report. The second four are dashed as well.
"""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a63d2", "#7a8b1e", "#d7263d", "#8c6d46")
MAX_GROUPS = len(COLORS)


def dashed(k: int) -> bool:
    """Whether the line of group k is dashed."""
    return k >= 4
