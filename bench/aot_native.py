"""Compile every csrc/*.cu with nvcc for six architectures, without a GPU, and hold what kernels use against a budget.

    python bench/aot_native.py [OP ...] [--update]

Spills must be 0. Registers and shared memory may not exceed bench/aot_native.json, which `--update` rewrites (registers
rounded up to 8, as the hardware hands them out); another release of nvcc than the one in it gets 8 registers more. Exit
code 1 when anything is over its budget or has none; 0 with a sentence when there is no nvcc.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_suffix(".json")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Use(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes, static


def find_nvcc() -> str | None:
    """nvcc by the rules of CMakeLists.txt: CUDACXX, the path, the usual folders."""
    if "CUDACXX" in os.environ:
        return os.environ["CUDACXX"]
    folders = [os.path.join(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def readable(mangled: str) -> str:
    """`mask_plan_kernel<32,8>` from a mangled name: the last of its nested names and the integer template arguments."""
    at, name = mangled.find("N") + 1, mangled
    while length := re.match(r"\d+", mangled[at:]):
        at += length.end()
        name = mangled[at : at + int(length[0])]
        at += len(name)
    arguments = re.match(r"I((?:L[a-z]\d+E)+)E", mangled[at:])
    return name + (f"<{','.join(re.findall(r'[0-9]+', arguments[1]))}>" if arguments else "")


def parse(report: str) -> dict[str, Use]:
    """Kernel name -> use, from what `ptxas -v` says on its error stream."""
    found = {}
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", report):
        entry, spills, used, shared = (pattern.search(part) for pattern in (ENTRY, SPILLS, USED, SHARED))
        if entry and spills and used:
            total = int(spills[1]) + int(spills[2])
            found[readable(entry[1])] = Use(int(used[1]), total, int(shared[1]) if shared else 0)
    return found


def compile_one(nvcc: str, source: Path, arch: int) -> dict[str, Use]:
    """Compile for sm_<arch> with the flags of the build; SystemExit with the compiler's words when that fails."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-cubin", "-Xptxas", "-v", f"-arch=sm_{arch}"]
        run = subprocess.run([nvcc, *flags, str(source), "-o", f"{folder}/out.cubin"], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{source.name}: nvcc failed for sm_{arch}:\n{run.stdout}{run.stderr}")
    return parse(run.stderr)


def over_budget(use: Use, budget: dict[str, int] | None, slack: int) -> list[str]:
    """Sentences about what is too much, with `slack` registers granted; empty when all is well."""
    found = [f"{use.spills} bytes spilled, expected 0"] if use.spills else []
    if budget is None:
        return [*found, "no budget (run bench/aot_native.py --update and look at the difference)"]
    if use.registers > budget["registers"] + slack:
        found.append(f"{use.registers} registers, budget {budget['registers']} + {slack} for another nvcc")
    if use.shared > budget["shared"]:
        found.append(f"{use.shared} bytes of shared memory, budget {budget['shared']}")
    return found


def release(nvcc: str) -> str:
    """ "13.0", or "unknown"."""
    said = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return said[1] if said else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="default: every .cu file of csrc/")
    parser.add_argument("--update", action="store_true", help="write what was measured as the new budget")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("aot_native: skipped because nvcc was not found; the CUDA toolkit has it")
        return 0
    version = release(nvcc)
    committed = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"nvcc": version, "kernels": {}}
    budget: dict[str, dict[str, int]] = committed["kernels"]
    slack = 0 if options.update or version == committed["nvcc"] else 8
    ops = options.ops or sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
    measured, bad = {}, []
    print(f"nvcc {version}, budget of nvcc {committed['nvcc']}")
    print(f"{'kernel':34s} {'arch':7s} {'registers':>9s} {'spills':>7s} {'shared':>7s}")
    for op in ops:
        for arch in ARCHITECTURES:
            for name, use in compile_one(nvcc, ROOT / "csrc" / f"{op}.cu", arch).items():
                key = f"{op}/{name}/sm_{arch}"
                print(f"{name:34s} sm_{arch:<4d} {use.registers:9d} {use.spills:7d} {use.shared:7d}")
                measured[key] = {"registers": -(-use.registers // 8) * 8, "shared": use.shared}
                bad += [
                    f"{key}: {why}"
                    for why in over_budget(use, (measured if options.update else budget).get(key), slack)
                ]
    if options.update:
        kept = {key: value for key, value in budget.items() if options.ops and key.split("/")[0] not in ops}
        lines = [f'  "{key}": {json.dumps(value)}' for key, value in sorted((kept | measured).items())]
        BUDGET.write_text(f'{{\n "nvcc": "{version}",\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}\n")
    elif not options.ops:
        bad += [f"{key}: in the budget, but no such kernel" for key in budget if key not in measured]
    print("\n".join(bad) or f"{len(measured)} compilations within budget, no spills")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
