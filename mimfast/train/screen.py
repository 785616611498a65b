"""What a run shows: a live bar on a terminal, plain lines otherwise, nothing on ranks other than the first."""

import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


class Screen:
    """Prints for one process. The bar needs rich and a terminal; NO_COLOR turns colours off, TERM=dumb the bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live: Any = None
        self._move: Callable[[int], Any] = lambda step: None
        self._write: Callable[[str], Any] = lambda text: None
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.live = terminal and not quiet and find_spec("rich") is not None
        self._colour = terminal and not os.environ.get("NO_COLOR")

    def say(self, text: str, style: str = "") -> None:
        """One sentence, or several lines. style: "bold", "dim" or "yellow"."""
        if self.quiet:
            return
        code = {"bold": "1", "dim": "2", "yellow": "33"}.get(style)
        if code and self._colour:
            text = f"\033[{code}m{text}\033[0m"
        if self._live is not None:
            from rich.text import Text

            # the display moves down by itself
            self._live.console.print(Text.from_ansi(text), soft_wrap=True)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """One sentence that asks for attention."""
        self.say(f"warning: {text}", "yellow")

    def begin(self, step: int, steps: int) -> None:
        """Start the display of the training loop: a bar, and the numbers below it."""
        if not self.live:
            return
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        progress = Progress(TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TimeElapsedColumn())
        task = progress.add_task("", total=steps, completed=step)
        numbers = Text("waiting for the first images")
        self._move = lambda done: progress.update(task, completed=done)
        self._write = lambda text: setattr(numbers, "plain", text)
        console = Console(no_color=not self._colour)
        self._live = Live(Group(progress, numbers), console=console, refresh_per_second=4)
        self._live.start()

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._live is not None:
            self._move(step)

    def line(self, line: dict[str, Any], steps: int, left: float | None = None) -> None:
        """Show one line of metrics. left: images still to come, in units of the work of a present one; None: as many
        as the present batch size gives.
        """
        left = (steps - line["step"]) * line["batch_size"] if left is None else left
        numbers = "  ".join(_numbers(line, left))
        if self._live is not None:
            self._write(numbers)
        else:
            self.say(f"step {line['step']:{len(str(steps))}d}/{steps}  {numbers}")

    def end(self) -> None:
        """Stop the display of the loop; its last state stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, title: str, head: list[str], rows: list[list[str]], notes: list[str]) -> None:
        """Print a small table, first row in bold, numbers to the right, notes below."""
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        rule = "-" * (sum(widths) + 3 * (len(widths) - 1))

        def joined(cells: list[str]) -> str:
            return "   ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths)))

        self.say(f"\n{title}", "bold")
        self.say(f"{joined(head)}\n{rule}", "dim")
        for i, row in enumerate(rows):
            self.say(joined(row), "" if i else "bold")
        self.say(rule, "dim")
        for note in notes:
            self.say(note, "dim")


def _numbers(line: dict[str, Any], left: float) -> list[str]:
    rate = line["images_per_second"]
    numbers = [
        f"loss {line['loss']:.4f}",
        f"{rate:.0f} img/s",
        f"data-wait {100 * line['data_wait']:.0f} %",
        f"lr {line['lr']:.1e}",
        f"mem {line['memory'] / 2**30:.2f} GiB",
        f"eta {clock(left / rate if rate else math.nan)}",
    ]
    more = {"skipped steps": line["skipped"], "bad images": line["bad_images"]}
    return numbers + [f"{name} {count}" for name, count in more.items() if count]


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
