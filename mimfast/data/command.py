"""`mimfast prep` and `mimfast prep verify`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from mimfast.data.prep import PrepConfig, Progress, Summary, prep
from mimfast.data.sources import open_source
from mimfast.data.store import BAD, Store
from mimfast.data.verify import verify

HELP = """usage: mimfast prep SRC OUT [options]
       mimfast prep verify OUT

Write the images of SRC (what --data takes: a folder, tar shards, parquet, arrays, a store) into the store OUT, at
training size, with a checksum each; then train with --data OUT. The command may be killed at any moment: run again, it
goes on. Images that cannot be read are left out and listed in OUT/bad.jsonl. `verify` reads a whole store and names
every damaged image; its exit code is 2 when there is one.

"""
_SHOWN = 20


def main(rest: list[str]) -> int:
    """The words after `mimfast prep`; returns the exit code."""
    if rest[:1] == ["verify"]:
        return _verify(rest[1:])
    return _prep(rest)


def _prep(rest: list[str]) -> int:
    import tyro

    def command(
        src: Annotated[str, tyro.conf.Positional],
        out: Annotated[Path, tyro.conf.Positional],
        size: int = 256,
        format: Literal["jpeg", "raw"] = "jpeg",
        quality: int = 90,
        square: bool = False,
        filter: Literal["bicubic", "lanczos", "bilinear"] = "bicubic",
        workers: int = 0,
    ) -> None:
        """Write images into a store, at training size.

        Args:
            src: A folder of images, tar shards, parquet files, arrays, a store, "photos" or "digits".
            out: The folder of the store; new, empty, or one that the same command has begun.
            size: Pixels of the short side; larger images are reduced to it, smaller ones left alone.
            format: Of the records: jpeg, or raw pixels, which need no decoder and 6 to 10 times the space.
            quality: Of JPEG, 1 to 100. A JPEG that needs no resizing is kept byte for byte.
            square: Cut the largest centred square, size x size pixels, whatever the image had.
            filter: Of the resizing, with antialias.
            workers: Threads; 0 is one per usable CPU.
        """
        config = PrepConfig(size, format, quality, square, filter)
        source = open_source(src)
        _tell_skipped(source)
        try:
            with _display("images") as progress:
                done = prep(source, out, config, origin=src, workers=workers or None, progress=progress)
        except KeyboardInterrupt:
            print(f"prep: stopped; the same command goes on with '{out}'", file=sys.stderr)
            raise
        print(_report(done, out))

    if rest in (["-h"], ["--help"]):
        print(HELP)
    tyro.cli(command, args=rest, prog="mimfast prep", description="")
    return 0


def _verify(rest: list[str]) -> int:
    import tyro

    def command(out: Annotated[Path, tyro.conf.Positional]) -> list[str]:
        """Read a whole store and hold every record against its checksum.

        Args:
            out: The folder of the store.
        """
        with _display("records") as progress:
            return verify(out, None if progress is None else lambda done, count: progress(done, count, 0))

    problems = tyro.cli(command, args=rest, prog="mimfast prep verify")
    for problem in problems[:_SHOWN]:
        print(f"damaged: {problem}")
    if len(problems) > _SHOWN:
        print(f"damaged: {len(problems) - _SHOWN} more")
    store = "" if problems else f": {len(Store(rest[0]))} records are as they were written"
    print(f"verify: {len(problems)} problems{store}")
    return 2 if problems else 0


def _report(done: Summary, out: Path) -> str:
    if done.resumed == done.images + done.bad:
        text = f"prep: '{out}' was there already, with {done.images} images ({done.bytes / 1e6:.1f} MB)"
    else:
        made = done.images + done.bad - done.resumed
        text = (
            f"prep: '{out}' has {done.images} images ({done.bytes / 1e6:.1f} MB, "
            f"{done.bytes / done.images / 1e3:.1f} kB each); {made} read in {done.seconds:.1f} s, "
            f"{made / done.seconds:.0f} images/s"
        )
    return text + (f"; {done.bad} bad images were left out, see {out / BAD}" if done.bad else "")


def _tell_skipped(source: object) -> None:
    """What the source itself has passed over."""
    counts = dict(getattr(source, "skipped", {}))
    if getattr(source, "unreadable_folders", 0):
        counts["folders that could not be listed"] = getattr(source, "unreadable_folders")  # noqa: B009
    if counts:
        print("prep: the source leaves out " + ", ".join(f"{n} {kind}" for kind, n in counts.items()), file=sys.stderr)


@contextmanager
def _display(unit: str) -> Iterator[Progress | None]:
    """A line with share, rate and time left on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}  {task.fields[rate]}  {task.fields[bad]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=None, rate="", bad="")

        def show(done: int, count: int, bad: int) -> None:
            speed = bar.tasks[0].speed
            rate = "" if not speed else f"{speed:.0f}/s"
            bar.update(task, completed=done, total=count, rate=rate, bad=f"{bad} bad" if bad else "")

        yield show
