"""Speed of one training step of somebody else's model before and after `mimfast.accelerate`.

    python bench/step/bench_accelerate.py [MODEL ...] [--json FILE] [--rounds N] [--threads N] [--compile]

MODEL is one of the names below; default swin_tiny. A step is forward, backward of the cross entropy, a fused AdamW at
224 px (256 px for Swin V2): on a CPU batch 8 in fp32, on a GPU batch 128 in bf16 autocast. All contestants start from
the same weights; first their losses are compared. They take turns in one process, and ratios are medians of the ratios
of one turn. "sdpa" is timm with its experimental fused attention switched on, or transformers' default.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mimfast
from mimfast.testing.record import machine, write_record


def timm_model(name: str, size: int) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, img_size=size, drop_path_rate=0.0)


def hf_model(name: str) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

    made = {"swin": (SwinConfig, SwinForImageClassification), "swinv2": (Swinv2Config, Swinv2ForImageClassification)}
    config, model = made[name]
    return model(config(num_labels=1000, drop_path_rate=0.0))


MODELS = {
    "swin_tiny": (lambda: timm_model("swin_tiny_patch4_window7_224", 224), 224),
    "swin_base": (lambda: timm_model("swin_base_patch4_window7_224", 224), 224),
    "swinv2_tiny": (lambda: timm_model("swinv2_tiny_window8_256", 256), 256),
    "vit_small": (lambda: timm_model("vit_small_patch16_224", 224), 224),
    "hf_swin_tiny": (lambda: hf_model("swin"), 224),
    "hf_swinv2_tiny": (lambda: hf_model("swinv2"), 224),
}


def loss_of(model: nn.Module, img: Tensor, labels: Tensor) -> Tensor:
    out: Any = model(img)
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, labels)


def contestants(plain: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    found = {"plain": plain}
    fusable = [m for m in plain.modules() if getattr(m, "fused_attn", None) is False]
    if fusable:
        found["sdpa"] = copy.deepcopy(plain)
        for module in found["sdpa"].modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True
    found["accelerated"] = copy.deepcopy(plain)
    mimfast.accelerate(found["accelerated"])
    if compiled:
        found |= {f"{name}, compiled": torch.compile(copy.deepcopy(model)) for name, model in list(found.items())}
    return found


def race(models: dict[str, nn.Module], img: Tensor, labels: Tensor, rounds: int) -> dict[str, list[float]]:
    half, steps = img.is_cuda, {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = loss_of(model, img, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        step()
        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = _clock()
            step()
            seconds[name].append(_clock() - began)
    return seconds


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, batch: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    make, size = MODELS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    models = contestants(make().train().to(device), compiled)
    img, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    losses = {who: float(loss_of(model, img, labels)) for who, model in models.items()}
    seconds = race(models, img, labels, rounds)
    print(f"\n{name}, batch {batch}, {size} px\n{'contestant':24s}   loss     median s  images/s  x plain  x sdpa")
    rows = []
    for who, seen in seconds.items():
        mode = ", compiled" if who.endswith(", compiled") else ""
        row = {"model": name, "contestant": who, "loss": losses[who], "median_s": statistics.median(seen)}
        for peer in ("plain", "sdpa"):
            if peer + mode in seconds:
                row[f"times_{peer}"] = statistics.median(p / s for p, s in zip(seconds[peer + mode], seen))
        ratios = "".join(f"{row[f'times_{p}']:8.2f}" if f"times_{p}" in row else 8 * " " for p in ("plain", "sdpa"))
        print(f"{who:24s}{losses[who]:10.6f}{row['median_s']:10.3f}{batch / row['median_s']:10.2f}{ratios}")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["swin_tiny"], metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=20 if torch.cuda.is_available() else 5)
    parser.add_argument("--threads", type=int, help="of a CPU run")
    parser.add_argument("--batch", type=int, default=128 if torch.cuda.is_available() else 8)
    parser.add_argument("--compile", action="store_true", help="also race the compiled models")
    options = parser.parse_args()
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown models {sorted(unknown)}; known are {', '.join(MODELS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    where = machine()
    print(f"{where['device']}, {where['threads']} threads")
    rows = [row for name in options.models for row in measure(name, options.batch, options.rounds, options.compile)]
    if options.json:
        write_record(options.json, {"step": "accelerate", "batch": options.batch, "rows": rows})
    off = [r for r in rows if abs(r["loss"] - rows[0]["loss"]) > 1e-3 and r["model"] == rows[0]["model"]]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
