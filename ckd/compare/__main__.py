"""ckd compare RUN...: a table of finished runs, and a figure or a page of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ckd._console import say
from ckd._json import document
from ckd._output import check_output
from ckd.cli.command import Output, parse, run
from ckd.compare.figure import draw, draw_groups
from ckd.compare.find import find_runs, labels
from ckd.compare.page import write_page
from ckd.compare.table import group_figures, group_seeds, seed_table, table
from ckd.train.errors import TrainError


@dataclass(frozen=True)
class Command(Output):
    """Compare finished runs: a table, and with --out a figure, with --html a page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that hold runs at any depth."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FIGURE.png")] = None
    """Draw memory, time per epoch and accuracy of the runs into this file."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """Write a page with a table that sorts, accuracy by training time, and the curves."""
    seeds: tyro.conf.FlagCreatePairsOff[bool] = False
    """One row for runs that differ only in their seed: mean and spread."""

    def run(self) -> None:
        if not self.runs:
            raise TrainError("name at least one run folder: ckd compare RUN...")
        for name, path in (("--out", self.out), ("--html", self.html)):
            if path is not None:
                check_output(path, name)
        found = find_runs(self.runs, settings=self.seeds)
        if not found.results:
            raise TrainError("; ".join(found.skipped))
        for reason in found.skipped:
            say(f"left out: {reason}")
        folders = list(found.results)
        names = labels(folders)
        results = [
            {**result, "run": name, "folder": str(folder)}
            for name, (folder, result) in zip(names, found.results.items())
        ]
        groups = [(result["run"], [result]) for result in results]
        if self.seeds:
            by_folder = {result["folder"]: result for result in results}
            named = group_seeds(folders)
            groups = [(n, [by_folder[r["folder"]] for r in group]) for n, group in named.items()]
        if self.json:
            print(document([_group(*group) for group in groups] if self.seeds else results))
        else:
            print(seed_table(dict(groups)) if self.seeds else table(results))
        if self.out is not None:
            draw_groups(groups, self.out) if self.seeds else draw(results, self.out)
            say(f"\nfigure: {self.out}")
        if self.html is not None:
            write_page(groups, self.html, seeds=self.seeds)
            say(f"\npage: {self.html}")


def _group(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A group for --json: its name, its figures, and its runs."""
    return {"runs": name, "seeds": len(results), **group_figures(results), "members": results}


COMMAND = Command


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.compare") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Command, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
