"""tools/test.py says what it is doing, how long it takes, and that it lives."""

import re
import sys
import time

from tools import test as tool


def test_a_silent_step_says_that_it_lives(capsys):
    with tool.Pulse(seconds=300, silence=0.05) as pulse:
        time.sleep(0.3)
        pulse.heard = time.perf_counter() + 100      # as if it had printed
        shown = capsys.readouterr().out
        time.sleep(0.2)
        assert not capsys.readouterr().out
    assert re.search(r"… 0 s of about 5 min$", shown, re.MULTILINE), shown
    assert tool.Pulse.now is None


def test_a_command_is_shown_and_heard(capsys):
    with tool.Pulse(seconds=1) as pulse:
        before = pulse.heard
        status, printed = tool.run(sys.executable, "-c", "print('hello'); raise SystemExit(3)")
        assert (status, printed.strip()) == (3, "hello") and pulse.heard > before


def test_steps_and_the_time_they_take(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test.py", "--only", "export", "repo"])
    monkeypatch.setattr(tool, "STEPS", {
        "export": ("first", 2, lambda: (1, 0)), "repo": ("second", 4, lambda: (2, 1))})
    assert tool.main() == 1
    shown = capsys.readouterr().out
    assert "This takes about 6 min on two cores" in shown
    assert "1/2 first: about 2 min, 6 min to the end" in shown and "3 passed, 1 failed" in shown
    assert "2/2 second: about 0 s" in shown          # the first was that much faster than expected
