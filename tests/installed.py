"""Lets an installed ckd be tested beside an unbuilt source tree, as that of an unpacked sdist.

pytest, `python -m` and PYTHONPATH put the tree first on the path of imports; its `ckd` then hides
the installed one, whose kernels it lacks. A tree that was built (an editable install) is tested.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def prefer() -> None:
    """Put the tree last on the path of imports, here and in child processes, if it has no compiled
    module and an installed ckd has one."""
    files = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve()]
    built = [Path(entry) for entry in others if any(Path(entry, "ckd", f).is_file() for f in files)]
    if not built or any((ROOT / "ckd" / file).is_file() for file in files):
        return
    sys.path[:] = [*others, str(ROOT)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # With PYTHONSAFEPATH a program's own folder is not on its path.
    paths = [str(built[0]), *inherited, str(ROOT), str(ROOT / "benchmarks")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    os.environ["PYTHONSAFEPATH"] = "1"  # Python 3.10 does not read it: there, children use the tree
