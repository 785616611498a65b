"""How far models are from float64 before and after `mimfast.accelerate`: outputs and gradients, at real sizes.

    python bench/step/parity_accelerate.py [MODEL ...] [--json FILE] [--batch N]

MODEL is a name in mimfast/testing/parity.py; default all. Errors are root mean squares relative to the values; of the
gradients that of the worst parameter. Prints a Markdown table; exits 1 when an accelerated model is further away than
twice the plain one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mimfast.testing.parity import MODELS, measure
from mimfast.testing.record import machine, write_record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown models {sorted(unknown)}; known are {', '.join(MODELS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine()['device']}, float32, batch {options.batch}\n")
    print("| model | modules | forward error | plain | gradient error | plain | |\n|---|---|---|---|---|---|---|")
    rows = []
    for name in options.models:
        row = measure(name, options.batch, device)
        rows.append({**row._asdict(), "passed": row.passed})
        errors = " | ".join(f"{e:.1e}" for e in row[2:])
        verdict = "" if row.passed else "above twice plain"
        print(f"| {name} | {row.modules[0]} of {row.modules[1]} | {errors} | {verdict} |", flush=True)
    if options.json:
        write_record(options.json, {"step": "parity of accelerate", "batch": options.batch, "rows": rows})
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
