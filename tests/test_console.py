"""Notes and progress bars: where they go, and when they are silent."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time

import pytest

from ckd._console import bar, console, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_notes_go_to_stdout_to_stderr_beside_json_and_nowhere_if_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say("a")
    with console(json=True):
        say("b")
        with console(quiet=True, json=True):
            say("c")
        say("d")
    say("e", shown=False)
    say("f")
    assert capsys.readouterr() == ("a\nf\n", "b\nd\n")


@pytest.mark.parametrize("delay", [0.0, None], ids=["at once", "after two seconds"])
def test_a_bar_is_shown_on_a_terminal_only_and_not_for_short_work(
    delay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if delay is None else {"delay": delay}
    shown = {}
    for terminal, quiet in [(True, False), (True, True), (False, False)]:
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with console(quiet=quiet), bar("work", total=3, unit="images", **options) as progress:
            for _ in range(3):
                time.sleep(0.11)
                progress.update()
        shown[terminal, quiet] = "work" in stream.getvalue()
    assert shown == {(True, False): delay == 0.0, (True, True): False, (False, False): False}


def test_a_killed_process_does_not_stop_the_bars_of_another() -> None:
    child = os.fork()
    if child == 0:
        with bar("work", total=1, unit="images") as progress:
            progress.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    thread = threading.Thread(
        target=lambda: bar("work", total=1, unit="images").close(), daemon=True
    )
    thread.start()
    thread.join(10)
    assert not thread.is_alive()  # else it waits for the lock
