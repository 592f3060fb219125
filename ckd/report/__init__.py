"""Pages that a browser draws without a network: report.html of a run, and the comparison of runs.

It knows figures and images, not runs: `ckd.train.page` and `ckd.compare` collect them.
"""

from ckd.report.page import render

__all__ = ["render"]
