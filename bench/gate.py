"""Tests first, then speed, never of wrong code: `python bench/gate.py OP [arguments of the benchmark]`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(op: str, *rest: str) -> int:
    test, bench = ROOT / f"tests/ops/test_{op}.py", ROOT / f"bench/ops/bench_{op}.py"
    for path in (test, bench):
        if not path.exists():
            print(f"gate: OP has {op!r}, expected the name of an op because {path.relative_to(ROOT)} does not exist")
            return 2
    for command in ([sys.executable, "-m", "pytest", "-q", str(test)], [sys.executable, str(bench), *rest]):
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python bench/gate.py OP [--json FILE] [--rounds N]")
    sys.exit(main(*sys.argv[1:]))
