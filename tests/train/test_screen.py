"""Plain lines off a terminal, a moving display on one, nothing on other ranks, no colours under NO_COLOR."""

import io
import math
import sys

import pytest

from mimfast.train.screen import Screen, clock

LINE = {
    "step": 5, "loss": 0.12346, "images_per_second": 100.0, "data_wait": 0.034, "lr": 1e-3, "memory": 2**30,
    "batch_size": 10, "skipped": 0, "bad_images": 0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _terminal(monkeypatch):
    # not a fixture: pytest puts its own stdout back between set-up and test
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return out


def _show(screen):
    screen.begin(0, 1205)
    screen.step(5)
    screen.line(LINE, 1205)
    screen.warn("look")
    screen.end()
    screen.table("Title", ["name", "n"], [["a", "1"], ["bb", "22"]], ["note"])


def test_plain_lines_when_it_is_no_terminal(capsys):
    _show(Screen())
    out = capsys.readouterr().out
    numbers = "loss 0.1235  100 img/s  data-wait 3 %  lr 1.0e-03  mem 1.00 GiB  eta 2:00"
    assert f"step    5/1205  {numbers}\n" in out
    assert "warning: look\n" in out
    assert "a       1\nbb     22\n" in out
    assert "\033" not in out


def test_rare_trouble_is_in_the_line(capsys):
    Screen().line({**LINE, "skipped": 2, "bad_images": 3}, 9)
    assert "skipped steps 2  bad images 3" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_that_fits_and_the_numbers(monkeypatch):
    terminal = _terminal(monkeypatch)
    _show(Screen())
    out = terminal.getvalue()
    assert "step 5/1205" in out
    assert "loss 0.1235  100 img/s" in out
    assert "look" in out
    assert "\033[" in out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_or_no_bar_when_asked(monkeypatch, name, value):
    terminal = _terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    screen = Screen()
    if name == "TERM":
        assert not screen.live
    else:
        _show(screen)
        assert "\033[33m" not in terminal.getvalue()
        assert "38;5;" not in terminal.getvalue()


def test_other_ranks_say_nothing(monkeypatch):
    terminal = _terminal(monkeypatch)
    _show(Screen(quiet=True))
    assert terminal.getvalue() == ""


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3661, math.nan, math.inf)] == ["0:00", "1:00", "1:01", "1:01:01", "?", "?"]
