"""Stage faults: deaths and errors at every call that opens or changes a file."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.calls import DIED, Calls, Plan, plans
from tests.campaign.child import Failure, Result, descriptors, in_child
from tests.campaign.commands import (
    Command,
    Prepared,
    difference,
    disturbed,
    fresh,
    goes_on,
    prepare,
    unlocked_as_told,
)


def stage(root: Path, seed: int) -> Callable[[int], Result]:
    prepared = prepare(root)
    drawn = []
    for one in prepared:
        every = [
            (one, one.starts.index(start), plan)
            for (start, no_flock), names in one.calls.items()
            for plan in plans(names, no_flock=no_flock)
        ]
        random.Random(f"faults {seed}").shuffle(every)
        drawn.append(every)

    def case(number: int) -> Result:
        every = drawn[number % len(drawn)]
        one, which, plan = every[number // len(drawn) % len(every)]
        path = fresh(one.starts[which], root / "disturbed")
        floor = one.floors[which]
        result = (
            _error(one, root, path, plan, floor)
            if plan.code
            else _death(one, root, path, plan, floor)
        )
        call = one.calls[one.starts[which], plan.no_flock][plan.n - 1]
        if result.fault:
            about = f"{one.command.name} from {one.starts[which].name}, {call}: {plan}"
            return Result(result.kind, f"{about}: {result.fault}")
        return result

    return case


def _death(one: Prepared, root: Path, path: Path, plan: Plan, floor: int) -> Result:
    ended = in_child(disturbed, one.command, root, path, plan)
    if ended.failure or ended.death not in ("", f"exit {DIED}"):
        return Result("raised", f"{ended.failure or ended.death}")
    return goes_on(one, root, path, floor, no_flock=plan.no_flock)


def _error(one: Prepared, root: Path, path: Path, plan: Plan, floor: int) -> Result:
    ended = in_child(_with_error, one.command, root, path, plan)
    if ended.value is None:
        return Result("untyped", f"{ended.failure or ended.death}")
    failure, leaks, again = ended.value
    if failure is None:  # the command did without the call
        told = difference(again, one.expected)
        # What cannot be deleted may stay.
        harmless = not told or ("more or fewer" in told and one.command.name == "train")
        return Result("unharmed") if harmless else Result("other result", told)
    if not failure.typed:
        return Result("untyped", str(failure))
    if str(root) not in failure.text:
        return Result("unnamed", str(failure))
    if leaks:
        return Result("leak", f"{leaks} after {failure}")
    if told := str(again) if isinstance(again, Failure) else difference(again, one.expected):
        return Result("not finished", f"run again in the same process: {told}")
    return goes_on(one, root, path, floor, no_flock=plan.no_flock)


def _with_error(
    command: Command, root: Path, path: Path, plan: Plan
) -> tuple[Failure | None, set[str], Any]:
    """The failure, the descriptors that it left open, and the result of a second run here."""
    before, failure = descriptors(root), None
    calls = Calls(root, plan)
    try:
        command.run(path)
    except Exception as error:  # noqa: BLE001 (the stage judges it)
        failure = Failure.of(error)
    calls.quiet = True
    gc.collect()  # objects in cycles are no leaks
    leaks = descriptors(root) - before
    if failure is None:
        return None, leaks, command.result(path)
    for _ in range(2):
        try:
            command.run(path)
            return failure, leaks, command.result(path)
        except Exception as error:  # noqa: BLE001
            again = Failure.of(error)
            if not unlocked_as_told(path, again):
                break
    return failure, leaks, again
