"""`ckd compare`: finished runs side by side, in a table, a figure and a page."""

from ckd.compare.figure import draw
from ckd.compare.table import group_seeds, memory_mib, seed_table, table

__all__ = ["draw", "group_seeds", "memory_mib", "seed_table", "table"]
