"""The stages of bench/gpu_suite.sh. Imports no torch itself, so that a stage that breaks the GPU does not break it."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "gpu_suite"
TOTAL_S = 570  # of the ten minutes a lent machine gives to one command

# run in a child after the build, so that the hashes are those of the built core
FACTS = "import json; from mimfast.testing.record import machine, sources; print(json.dumps([machine(), sources()]))"
GPU = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit_s: int
    report: Path | None = None  # what it writes: a JUnit file of tests or the JSON of a benchmark
    env: dict[str, str] = {}  # noqa: RUF012  constant


def stages(dry: bool, arch: str) -> list[Stage]:
    """What to run, in the order of worth: what comes last is what a slow machine loses."""
    python = sys.executable
    build, core = str(SCRATCH / "native"), str(SCRATCH / "dry" if dry else ROOT / "mimfast")
    cuda = ["-DMIMFAST_CUDA=OFF"] if dry else ["-DMIMFAST_CUDA=ON", f"-DMIMFAST_CUDA_ARCHS={arch}"]
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake",
        *ninja,
        "-S",
        str(ROOT),
        "-B",
        build,
        f"-DPython_EXECUTABLE={python}",
        f"-DMIMFAST_OUT={core}",
        *cuda,
    ]
    ops = ["tests/ops/test_noop.py", "tests/ops/test_choice.py"] if dry else ["tests/ops"]
    found = [
        Stage("configure", configure, 60),
        Stage("build", ["cmake", "--build", build, "--parallel"], 150),
        _tests("tests of ops", ops, 200),
    ]
    benches = [ROOT / "bench/ops/bench_noop.py"] if dry else sorted((ROOT / "bench/ops").glob("bench_*.py"))
    for path in benches:
        report = SCRATCH / f"{path.stem}.json"
        few = ["--rounds", "2"] if dry else []
        found.append(
            Stage(path.stem.replace("_", " ", 1), [python, str(path), "--json", str(report), *few], 150, report)
        )
    if not dry:
        found.append(_tests("tests of methods and encoders", ["tests/methods", "tests/encoders"], 120))
        found.append(
            _tests("tests of the cache", ["tests/data/test_resident.py", "tests/data/test_resident_loader.py"], 60)
        )
    if dry:
        return [*found, Stage("small shapes", [python, "bench/small_shapes.py"], 60, env={"TRITON_INTERPRET": "1"})]
    for tool in ("memcheck", "racecheck"):
        watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if shutil.which(watch[0]):
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation, so that an overrun is seen
            found.append(Stage(f"compute-sanitizer {tool}", [*watch, python, "bench/small_shapes.py"], 100, env=env))
    return found


def _tests(name: str, paths: list[str], limit_s: int) -> Stage:
    report = SCRATCH / f"{name.replace(' ', '_')}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
        *paths,
    ]
    return Stage(name, command, limit_s, report)


def run(stage: Stage, deadline: float, log: Any) -> dict[str, Any]:
    """Run one stage and all its children under a limit; never raises for what the stage does."""
    left = deadline - time.monotonic()
    limit = min(stage.limit_s, left)
    log.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    result: dict[str, Any] = {"stage": stage.name, "command": stage.command, "seconds": 0.0}
    if left < 5:
        return result | {"outcome": "failed", "why": f"no time left of {TOTAL_S} s"}
    if stage.report:
        stage.report.unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | stage.env
    start, at = time.monotonic(), log.tell()
    try:
        child = subprocess.Popen(stage.command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        return result | {"outcome": "failed", "why": str(error)}
    why = ""
    try:
        code = child.wait(limit)
        why = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        why = f"stopped after {limit:.0f} s"
    log.seek(at)
    tail = log.read()[-3000:]
    result |= {"outcome": "failed" if why else "passed", "why": why, "seconds": round(time.monotonic() - start, 1)}
    return result | ({"tail": tail} if why else {}) | read_report(stage.report)


def read_report(path: Path | None) -> dict[str, Any]:
    """The tests or the benchmark rows a stage left behind, empty when it died before writing them."""
    if path is None or not path.exists():
        return {}
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return {"op": content["op"], "rows": content["rows"]}
    tests = {}
    for case in ET.parse(path).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad[0]] if bad else "passed"
        tests[f"{case.get('file')}::{case.get('name')}"] = outcome
    return {"tests": tests}


def facts() -> dict[str, Any]:
    """Machine and source hashes; on a failure the reason in their place."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", FACTS], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if child.returncode:
        return {"machine": {"error": child.stderr[-500:]}, "sources": {}}
    machine, sources = json.loads(child.stdout.splitlines()[-1])
    return {"machine": machine, "sources": sources}


def save(record: dict[str, Any], dry: bool) -> list[Path]:
    """Write the record to bench/results and to $OUT (a dry run: to the scratch folder and $OUT); return the paths."""
    device = re.sub(r"[^a-z0-9]+", "-", str(record["machine"].get("device", "unknown")).lower()).strip("-")
    name = f"{'dry-run' if dry else 'gpu'}-{device}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    folders = [SCRATCH if dry else ROOT / "bench" / "results"]
    folders += [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    if os.environ.get("OUT"):
        shutil.copy(SCRATCH / "suite.log", Path(os.environ["OUT"]) / "suite.log")
    return [folder / name for folder in folders]


def table(record: dict[str, Any]) -> str:
    """The last thing printed: one line per stage, then the fastest facts of each benchmark."""
    lines = [f"{'stage':34s}{'outcome':9s}{'seconds':>8s}  what"]
    for s in record["stages"]:
        counts = [list(s.get("tests", {}).values()).count(o) for o in ("passed", "failed", "skipped")]
        what = "{} passed, {} failed, {} skipped".format(*counts) if "tests" in s else ""
        lines.append(
            f"{s['stage']:34s}{s['outcome']:9s}{s['seconds']:8.1f}  {'; '.join(filter(None, (what, s.get('why'))))}"
        )
    rows = [(s["op"], row) for s in record["stages"] for row in s.get("rows", [])]
    for op, row in rows:
        speed = "out of tolerance, no speed"
        if row.get("median_us"):
            ratio = f", x{row['times_yardstick']:.2f}" if row.get("times_yardstick") else ""
            speed = f"{row['median_us']:.1f} us, {row['gbps']:.0f} GB/s{ratio}"
        lines.append(f"{op:12s}{row['pass']:8s}{row['contestant']:14s}{row['case']:44s}{speed}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU; see bench/README.md.")
    parser.add_argument("--cpu-dry-run", action="store_true", help="exercise the stages without a GPU")
    dry = parser.parse_args().cpu_dry_run
    gpu = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, check=False).stdout.strip()
    if not gpu and not dry:
        print("gpu_suite: no GPU was found by torch on this machine; `--cpu-dry-run` exercises the stages without one.")
        return 2
    arch = ""
    if not dry:
        ask = "import torch; print('%d%d' % torch.cuda.get_device_capability(0))"
        arch = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results = []
    with open(SCRATCH / "suite.log", "w+", errors="replace") as log:
        for stage in stages(dry, arch):
            results.append(run(stage, start + TOTAL_S, log))
            print(f"{stage.name}: {results[-1]['outcome']} {results[-1].get('why', '')}", flush=True)
    record = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts(), "dry_run": dry, "stages": results}
    paths = save(record, dry)
    for s in results:
        if s["outcome"] == "failed":
            print(f"\n----- {s['stage']}: {s['why']}\n{s.get('tail', '')[-1500:]}")
    print(f"\n{table(record)}\nrecord: {', '.join(map(str, paths))}; log: {SCRATCH / 'suite.log'}")
    return 1 if any(s["outcome"] == "failed" for s in results) else 0


if __name__ == "__main__":
    sys.exit(main())
