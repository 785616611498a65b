"""Run every op x implementation on the first cases it takes, forward and backward, for compute-sanitizer to watch."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mimfast import ops
from mimfast._check import UserError
from mimfast.ops._choice import why_not_on

CASES_PER_OP = 4


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in ops.__all__:
        cases = import_module(f"mimfast.testing.{op}")
        for impl in import_module(f"mimfast.ops.{op}").IMPLS:
            reason, ran = why_not_on(impl, device), 0
            for case in cases.CASES if reason is None else []:
                if ran == CASES_PER_OP:
                    break
                args = cases.make(case, device)
                try:
                    out = getattr(ops, op)(**args, impl=impl)
                except UserError as error:
                    print(f"{op} {impl}: refused one case: {error}")
                    continue
                ran += 1
                if isinstance(out, torch.Tensor) and out.requires_grad:
                    out.sum().backward()
            print(f"{op} {impl}: {reason or f'ran {ran} cases'}")
    if device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
