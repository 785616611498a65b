"""Turn a passing GPU record into entries of mimfast/verified.json.

    python bench/verify_record.py bench/results/gpu-....json [--write]

An op x implementation is entered when the record was made on a GPU (no dry run), no test of its files (test_<op>.py,
test_<op>_<implementation>.py) failed, at least one test that names the implementation passed, its benchmark stayed in
tolerance, and its sources are those of this tree. Prints every decision with its reason; exit code 1 when nothing could
be entered.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mimfast.testing.record import sources

ROOT = Path(__file__).resolve().parent.parent
VERIFIED = ROOT / "mimfast" / "verified.json"


def why_not(record: dict[str, Any], op: str, impl: str, present: str | None) -> str | None:
    """Why this record does not verify `impl` of `op`, None when it does."""
    if record.get("dry_run", True) or record["machine"].get("device", "cpu") == "cpu":
        return "the record was not made on a GPU"
    recorded = record["sources"].get(op, {}).get(impl)
    if recorded is None or recorded != present:
        return "the sources of this tree are not those of the record"
    files = (f"test_{op}.py::", f"test_{op}_{impl}.py::")
    tests = {k: v for s in record["stages"] for k, v in s.get("tests", {}).items() if any(f in k for f in files)}
    failed = [name for name, outcome in tests.items() if outcome == "failed"]
    if failed:
        return f"{len(failed)} tests failed, first {failed[0]}"
    mine = [o for name, o in tests.items() if impl in name.partition("[")[2].rstrip("]").split("-")]
    if "passed" not in mine:
        return f"no test naming it passed ({len(mine)} skipped)"
    wrong = [row for s in record["stages"] if s.get("op") == op for row in s["rows"]]
    if any(row["out_of_tolerance"] for row in wrong if row["contestant"] == impl):
        return "its benchmark was out of tolerance"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--write", action="store_true", help="change mimfast/verified.json")
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    verified = json.loads(VERIFIED.read_text())
    entered = 0
    for op, by_impl in sources().items():
        for impl in by_impl.keys() & {"triton", "cuda"}:
            reason = why_not(record, op, impl, by_impl[impl])
            print(f"{op} {impl}: {reason or 'verified'}")
            if reason is None:
                entry = {
                    "sources": by_impl[impl],
                    "device": record["machine"]["device"],
                    "record": f"bench/results/{options.record.name}",
                }
                verified.setdefault(op, {})[impl] = entry
                entered += 1
    if options.write and entered:
        VERIFIED.write_text(json.dumps(verified, indent=1, sort_keys=True) + "\n")
    return 0 if entered else 1


if __name__ == "__main__":
    sys.exit(main())
