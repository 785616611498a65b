"""`mimfast doctor`: what this machine has, which fast paths are on, and why the others are off."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

CORE = ("torch", "triton", "numpy", "pillow", "safetensors", "tyro", "rich")
OPTIONAL = {
    "scikit-image": "the embedded photographs (pip install 'mimfast[demo]')",
    "scikit-learn": "the embedded photographs and digits (pip install 'mimfast[demo]')",
    "timm": "export and parity with timm (pip install 'mimfast[timm]')",
    "transformers": "export and parity with Hugging Face (pip install 'mimfast[hf]')",
    "tensorboard": "TensorBoard curves (pip install 'mimfast[track]')",
    "nvidia-dali-cuda130": "decoding on the GPU (pip install 'mimfast[dali]')",
    "flash-attn": "variable-length attention, used when installed",
    "apex": "fused optimizers and norms, used when installed",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    except OSError:
        return None


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from mimfast.data.cpu import cpu_quota, usable_cpus

    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    quota = cpu_quota()
    limit = f", quota {quota:g} cores" if quota else ", no quota"
    yield "CPU", f"{usable_cpus():g} cores usable of {os.cpu_count()}{limit}"
    yield "threads", f"torch {torch.get_num_threads()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    yield "driver", _driver() or "no NVIDIA driver"
    if not torch.cuda.is_available():
        yield "GPU", "none: everything runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"


def _native() -> Iterator[tuple[str, str]]:
    from mimfast import _native

    core = _native.core()
    yield "native core", _native.why_missing() or "built, CPU functions on"
    yield "native CUDA", _native.why_no_cuda() or f"built for sm_{core.cuda_archs() if core else ''}"


def op_names() -> list[str]:
    """The public ops, by the files that hold them."""
    folder = Path(__file__).parent / "ops"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def cpu_path_works() -> str | None:
    """None when one tiny MAE step runs on the CPU, else what went wrong."""
    import torch

    from mimfast.methods import MAE

    try:
        method = MAE.build(encoder="vit_ti16", img_size=32, decoder_dim=32, decoder_depth=1, decoder_heads=2)
        loss = method(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
        loss.backward()
        return None if torch.isfinite(loss) else f"the loss of a tiny MAE step is {loss.item()}"
    except Exception as error:  # the doctor reports whatever is wrong instead of dying of it
        return f"{type(error).__name__}: {error}"


IMPLS = ("ref", "cpu", "sdpa", "triton", "cuda")


def markdown() -> str:
    """The README's table of ops: what exists, and whether `auto` may choose it. The same on every machine."""
    lines = [f"| op | {' | '.join(f'`{impl}`' for impl in IMPLS)} |", "|" + "---|" * (len(IMPLS) + 1)]
    for op in op_names():
        lines.append(f"| `{op}` | {' | '.join(_standing(op, impl) for impl in IMPLS)} |")
    return "\n".join(lines)


def _standing(op: str, impl: str) -> str:
    from mimfast.ops._choice import verified

    if impl not in import_module(f"mimfast.ops.{op}").IMPLS:
        return "–"
    if impl in ("ref", "cpu", "sdpa"):
        return "in auto"
    record = verified().get(op, {}).get(impl)
    return f"in auto (verified on {record['device']})" if record else "by name only"


def main(markdown_only: bool = False) -> int:
    """Print the report. Returns 0 when the CPU path works, 1 otherwise."""
    if markdown_only:
        print(markdown())
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mimfast import __version__
    from mimfast.ops._choice import status

    # a report that goes to a file is not folded at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    facts = Table(box=box.SIMPLE, show_header=False, title=f"mimfast {__version__}", title_justify="left")
    for name, value in (*_machine(), *_native()):
        facts.add_row(name, value)
    facts.add_row("installed", ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in CORE))
    for name, use in OPTIONAL.items():
        facts.add_row(name, _version(name) or f"not installed: {use}")
    console.print(facts)

    ops = Table("op", "impl", "state", "reason", box=box.SIMPLE, title="ops", title_justify="left")
    for op in op_names():
        for row in status(op):
            ops.add_row(op, row.impl, row.state, row.reason)
    console.print(ops)

    wrong = cpu_path_works()
    console.print("CPU path: works" if wrong is None else f"CPU path: broken: {wrong}")
    return 0 if wrong is None else 1
