"""Compile every Triton kernel for six architectures, without a GPU, and hold what it uses against a budget.

    python bench/aot_triton.py [OP ...] [--update]

Each kernels/<op>.py names in `AOT` what to compile: name -> (kernel, argument types, constants, warps); a type ending
in `:16` promises a multiple of 16, and pointers always do. Register spills must be 0. Registers and shared memory may
not exceed bench/aot_triton.json, which `--update` rewrites for the installed version of Triton (registers rounded up to
8, as the hardware hands them out); what its version has no entry for is held against the largest of the others plus 8
registers.
Exit code 1 when anything is over its budget or has none.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_suffix(".json")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


Budgets = dict[str, dict[str, dict[str, int]]]  # version of Triton -> op/name/architecture -> registers, shared


class Use(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes


def compile_one(spec: tuple[Any, dict[str, str], dict[str, Any], int], capability: int) -> Use:
    """Compile one entry of an AOT dictionary for sm_<capability>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, warps = spec
    missing = set(kernel.arg_names) ^ set(types) ^ set(constants)
    if missing:
        raise ValueError(f"{kernel.__name__}: AOT and the kernel differ in {sorted(missing)}")
    # in the order of the kernel's arguments, which is how Triton numbers them
    signature = {n: types[n].removesuffix(":16") if n in types else "constexpr" for n in kernel.arg_names}
    even = [
        i for i, n in enumerate(kernel.arg_names) if n in types and (types[n][0] == "*" or types[n].endswith(":16"))
    ]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    registers, spills = assemble(built.asm["ptx"], capability)
    return Use(registers, spills, built.metadata.shared)


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, as Triton's own ptxas reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None, "Triton's PTX names no target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, f"ptxas reported no registers: {report}"
    return int(registers[1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def over_budget(use: Use, budget: dict[str, int] | None) -> list[str]:
    """Sentences about what is too much; empty when all is well."""
    found = [f"{use.spills} bytes spilled, expected 0"] if use.spills else []
    if budget is None:
        return [*found, "no budget (run bench/aot_triton.py --update and look at the difference)"]
    for what in ("registers", "shared"):
        if getattr(use, what) > budget[what]:
            found.append(f"{what} {getattr(use, what)}, budget {budget[what]}")
    return found


def loosest(budgets: Budgets) -> dict[str, dict[str, int]]:
    """What a kernel may use under a version of Triton without an entry for it."""
    found: dict[str, dict[str, int]] = {}
    for kernels in budgets.values():
        for key, use in kernels.items():
            known = found.setdefault(key, {"registers": 0, "shared": 0})
            found[key] = {
                "registers": max(known["registers"], use["registers"] + 8),
                "shared": max(known["shared"], use["shared"]),
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="default: every file of kernels/")
    parser.add_argument("--update", action="store_true", help="write what was measured as the new budget")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    sys.path.insert(0, str(ROOT))
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    budgets: Budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget = loosest(budgets) | budgets.get(version, {})
    ops = options.ops or sorted(p.stem for p in (ROOT / "kernels").glob("*.py"))
    measured, bad = {}, []
    print(f"triton {triton.__version__}, {len(ops)} files, sm_{' '.join(map(str, ARCHITECTURES))}")
    print(f"{'kernel':44s} {'arch':7s} {'registers':>9s} {'spills':>7s} {'shared':>7s}")
    for op in ops:
        for name, spec in import_module(f"mimfast.kernels.{op}").AOT.items():
            for capability in ARCHITECTURES:
                use, key = compile_one(spec, capability), f"{op}/{name}/sm_{capability}"
                print(f"{op + ' ' + name:44s} sm_{capability:<4d} {use.registers:9d} {use.spills:7d} {use.shared:7d}")
                measured[key] = {"registers": -(-use.registers // 8) * 8, "shared": use.shared}
                bad += [f"{key}: {why}" for why in over_budget(use, (measured if options.update else budget).get(key))]
    stale = (
        []
        if options.ops or options.update
        else [f"{key}: in the budget, but no such kernel" for key in budget if key not in measured]
    )
    if options.update:
        own = budgets.get(version, {})
        kept = {key: value for key, value in own.items() if options.ops and key.split("/")[0] not in ops}
        lines = [f' "{v}": {{\n' + ",\n".join(f'  "{k}": {json.dumps(b)}' for k, b in sorted(kernels.items())) + "\n }"
                 for v, kernels in sorted((budgets | {version: kept | measured}).items())]  # fmt: skip
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print("\n".join([*bad, *stale]) or f"{len(measured)} compilations within budget, no spills")
    return 1 if bad or stale else 0


if __name__ == "__main__":
    sys.exit(main())
