"""Stage kills: SIGKILL at random moments and calls, several times; then the command finishes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.campaign.calls import Plan
from tests.campaign.child import Result, in_child
from tests.campaign.commands import disturbed, fresh, goes_on, prepare


def stage(root: Path, seed: int) -> Callable[[int], Result]:
    prepared = prepare(root)
    seconds = {}
    for one in prepared:
        began = time.monotonic()
        in_child(one.command.run, fresh(one.starts[0], root / "timed"))
        seconds[one.command.name] = time.monotonic() - began

    def case(number: int) -> Result:
        chance = random.Random(f"kills {seed} {number}")
        one = prepared[number % len(prepared)]
        which, no_flock = chance.randrange(len(one.starts)), chance.random() < 0.3
        path = fresh(one.starts[which], root / "killed")
        names = one.calls[one.starts[which], no_flock]
        for _ in range(chance.randint(1, 4)):
            # After a kill fewer calls are left: a plan beyond them disturbs nothing.
            n = chance.randint(1, len(names)) if chance.random() < 0.5 else 0
            when = chance.choice(("before", "after", "half"))
            plan = Plan(n, when=when, no_flock=no_flock)
            moment = chance.uniform(0.0, 1.1 * seconds[one.command.name])
            in_child(disturbed, one.command, root, path, plan, kill_after=None if n else moment)
        return goes_on(one, root, path, one.floors[which], no_flock=no_flock)

    return case
