"""The run folder: found, claimed by one process, and marked as running, stopped or finished."""

import json
import os
import re
from pathlib import Path
from typing import Any

from mimfast._check import UserError

STATUS = "status.json"
CONFIG = "config.toml"


def next_free(name: str, root: Path = Path("runs")) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... after every one in use."""
    return root / f"{name}-{_highest(name, root) + 1}"


def last_used(name: str, root: Path = Path("runs")) -> Path | None:
    """The runs/NAME-N with the highest N, or None."""
    highest = _highest(name, root)
    return root / f"{name}-{highest}" if highest else None


def _highest(name: str, root: Path) -> int:
    found = [re.fullmatch(re.escape(name) + r"-(\d+)", p.name) for p in root.glob(f"{name}-*")]
    return max((int(match[1]) for match in found if match), default=0)


class Claim:
    """A run folder that this process alone writes to, until `release` or the process ends.

    Args:
        path: the folder; made when missing.
        resume: the folder must hold a run; otherwise it must be empty.
    Raises:
        UserError: the folder holds a run and resume is off, holds none and resume is on, is in use, or cannot be
            written.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._refuse(resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"pretrain: run.out has {str(path)!r}, expected a folder that can be written because {reason}"
            ) from error
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock; there the folder is not guarded against a second run
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"pretrain: run.out has {str(path)!r}, expected a folder of its own because another process is "
                "running in it"
            ) from error

    def _refuse(self, resume: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(
                f"pretrain: run.out has {str(path)!r}, expected a folder because a file of that name exists"
            )
        inside = [p.name for p in path.iterdir() if p.name != ".lock"] if path.is_dir() else []
        is_run = CONFIG in inside
        if resume and not is_run:
            raise UserError(
                f"pretrain: --resume has {str(path)!r}, expected the folder of a run because it holds no {CONFIG}"
            )
        if inside and not resume:
            holds = f"a run ({_told(path)})" if is_run else f"{len(inside)} other files, such as {sorted(inside)[0]!r}"
            instead = "pass --resume to continue it or another --out" if is_run else "pass another --out"
            raise UserError(
                f"pretrain: run.out has {str(path)!r}, expected an empty or new folder because it holds {holds} and "
                f"nothing is overwritten; {instead}"
            )

    def mark(self, state: str, step: int, steps: int) -> None:
        """Write status.json: state is "running", "stopped" or "finished"."""
        draft = self.path / f"{STATUS}.tmp"
        draft.write_text(json.dumps({"state": state, "step": step, "steps": steps}) + "\n", encoding="utf-8")
        os.replace(draft, self.path / STATUS)

    def release(self) -> None:
        """Let others in."""
        self._lock.close()


def status(path: Path) -> dict[str, Any]:
    """What status.json says; an empty dict when there is none."""
    try:
        return dict(json.loads((path / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _told(path: Path) -> str:
    found = status(path)
    return f"{found['state']}, step {found['step']} of {found['steps']}" if found else "just begun"
