"""python -m tests.campaign --minutes N [--seed S] [--only STAGE ...] [--case N]: random cases of
all stages in turn, a table, and for each fault the flags that show it again."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.campaign import faults, flips, kills, problems, structure
from tests.campaign.child import Result

STAGES = {
    "kills": kills.stage,
    "faults": faults.stage,
    "flips": flips.stage,
    "structure": structure.stage,
    "problems": problems.stage,
}
ROUND_S = 10.0  # of one stage, before the next has its turn


class Fault(NamedTuple):
    """A fault with the command that shows it again."""

    stage: str
    seed: int
    case: int
    result: Result

    def __str__(self) -> str:
        kind, what = self.result
        return f"--only {self.stage} --seed {self.seed} --case {self.case}   {kind}: {what}"


class Campaign:
    """Stages with their tallies; each case is a function of the seed and its number."""

    def __init__(self, root: Path, seed: int, names: Sequence[str]) -> None:
        self.seed = seed
        self.cases: dict[str, Callable[[int], Result]] = {}
        self.tallies: dict[str, Counter[str]] = {name: Counter() for name in names}
        self.faults: list[Fault] = []
        for name in names:
            self.cases[name] = STAGES[name](root, seed)

    def run(self, name: str, number: int) -> None:
        """One case; a fault is printed at once."""
        result = self.cases[name](number)
        self.tallies[name][result.kind] += 1
        if result.fault:
            self.faults.append(Fault(name, self.seed, number, result))
            print(self.faults[-1], flush=True)

    def run_for(self, minutes: float) -> None:
        """Cases of all stages in turn until the minutes are over."""
        began = time.monotonic()
        numbers = dict.fromkeys(self.cases, 0)
        while (left := began + 60 * minutes - time.monotonic()) > 0:
            turn = min(ROUND_S, left / len(numbers))
            for name in numbers:
                end = time.monotonic() + turn
                while time.monotonic() < end:
                    self.run(name, numbers[name])
                    numbers[name] += 1
            done = ", ".join(f"{name} {number}" for name, number in numbers.items())
            print(f"{time.monotonic() - began:6.0f} s   {done}   faults {len(self.faults)}")

    def table(self) -> str:
        """Stage, attempts, faults, and the outcomes by kind."""
        lines = [f"{'stage':<10} {'attempts':>8} {'faults':>6}  outcomes"]
        for name, tally in self.tallies.items():
            bad = sum(fault.stage == name for fault in self.faults)
            kinds = ", ".join(f"{kind} {count}" for kind, count in tally.most_common())
            lines.append(f"{name:<10} {tally.total():>8} {bad:>6}  {kinds}")
        return "\n".join([*lines, "", *map(str, self.faults)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--case", type=int, help="run this case alone")
    given = parser.parse_args(argv)
    seed = random.randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ckd-campaign-") as root:
        campaign = Campaign(Path(root).resolve(), seed, given.only)
        if given.case is None:
            campaign.run_for(given.minutes)
        else:
            for name in given.only:
                campaign.run(name, given.case)
        print(campaign.table())
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
