"""Speed of one MAE ViT-B/16 training step against transformers' ViTMAEForPreTraining with SDPA, eager and compiled.

    python bench/step/bench_mae_step.py [--json FILE] [--rounds N] [--threads N] [--no-compile] [--profile]

On a CPU: batch 8, fp32. On a GPU: batch 256, bf16 autocast, with peak memory. 224 px, 75 % hidden. A step is mask,
forward, backward and a fused AdamW. Both models start from the same weights; first their losses for the same masks are
compared. Contestants take turns in one process. Ratios are medians of the ratios of one turn, so that neighbours on the
machine count less. `--profile` prints where the time of an eager step goes instead, ours beside theirs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from mimfast import Mask
from mimfast._names import from_hf
from mimfast.methods import MAE
from mimfast.testing.record import machine, write_record

Step = Callable[[], Tensor]
PAIRS = (("hf eager", "ours eager"), ("hf compiled", "ours compiled"))


def models(size: str, device: str) -> tuple[nn.Module, MAE]:
    """Theirs with random weights, and ours with the same."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"tiny": (192, 2, 3, 64, 2, 2), "base": (768, 12, 12, 512, 8, 16)}
    dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = sizes[size]
    config = ViTMAEConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        decoder_hidden_size=decoder_dim,
        decoder_num_hidden_layers=decoder_depth,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_dim,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    theirs = ViTMAEForPreTraining(config).train()
    sizes_of_decoder = {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "decoder_heads": decoder_heads}
    ours = MAE.build("vit_b16", 224, dim=dim, depth=depth, heads=heads, **sizes_of_decoder)
    state = from_hf(theirs.state_dict())
    for name in ("pos_embed", "decoder_pos_embed"):  # some releases leave them at zero until a checkpoint is loaded
        state[name] = ours.state_dict()[name]
    ours.load_state_dict(state)
    theirs.vit.embeddings.position_embeddings.data.copy_(state["pos_embed"])
    theirs.decoder.decoder_pos_embed.data.copy_(state["decoder_pos_embed"])
    return theirs.to(device), ours.to(device)


def difference(theirs: nn.Module, ours: MAE, img: Tensor) -> dict[str, float]:
    """Both losses for the same masks, in fp32."""
    noise = torch.rand(img.shape[0], 196, device=img.device)
    with torch.no_grad():
        out = theirs(pixel_values=img, noise=noise)
        loss = ours(img, Mask.from_hidden(out.mask.bool()))
    return {"hf": out.loss.item(), "ours": loss.item(), "difference": abs(out.loss.item() - loss.item())}


def contestants(theirs: nn.Module, ours: MAE, img: Tensor, compiled: bool) -> dict[str, Step]:
    """A training step of each; eager and compiled share weights and optimizer."""
    steps: dict[str, Step] = {}
    half = img.device.type == "cuda"
    forwards: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {
        "hf": (theirs, lambda m: m(pixel_values=img).loss),
        "ours": (ours, lambda m: m(img)),
    }
    for who, (model, forward) in forwards.items():
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        runs = {"eager": model, "compiled": torch.compile(model, dynamic=False)} if compiled else {"eager": model}
        for how, run in runs.items():
            steps[f"{who} {how}"] = _step(run, forward, optimizer, half)
    return steps


def _step(
    model: nn.Module, forward: Callable[[nn.Module], Tensor], optimizer: torch.optim.Optimizer, half: bool
) -> Step:
    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = forward(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def race(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step by the clock and of the processor's threads, in turns, after two steps each to warm up."""
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        step()
        print(f"warm-up of {name}: {time.perf_counter() - start:.1f} s", flush=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _wait()
            clock, cpu = time.perf_counter(), time.process_time()
            step()
            _wait()
            found[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks(steps: dict[str, Step]) -> dict[str, float]:
    """GB that a step allocates at most on top of weights and optimizer states; empty without a GPU."""
    found: dict[str, float] = {}
    for name, step in steps.items() if torch.cuda.is_available() else ():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _wait()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return found


def report(samples: dict[str, list[tuple[float, float]]], memory: dict[str, float], batch: int) -> list[dict[str, Any]]:
    print(f"\n{'contestant':15s} median s   images/s  CPU s   x hf (same mode)  peak GB")
    rows = []
    rivals = {ours: theirs for theirs, ours in PAIRS}
    for name, seen in samples.items():
        wall, cpu = (statistics.median(s[i] for s in seen) for i in (0, 1))
        row = {"contestant": name, "median_s": wall, "images_per_s": batch / wall, "cpu_s": cpu}
        ratio = ""
        if name in rivals:
            by_turn = [t[0] / o[0] for t, o in zip(samples[rivals[name]], seen)]
            by_cpu = statistics.median(t[1] / o[1] for t, o in zip(samples[rivals[name]], seen))
            row |= {"times_hf": statistics.median(by_turn), "times_hf_cpu": by_cpu}
            ratio = f"{row['times_hf']:.2f} (CPU {by_cpu:.2f})"
        if name in memory:
            row["peak_gb"] = memory[name]
        gigabytes = f"{memory[name]:9.2f}" if name in memory else ""
        print(f"{name:15s}{wall:9.3f}{batch / wall:11.2f}{cpu:8.2f}   {ratio:18s}{gigabytes}")
        rows.append(row)
    return rows


def profile(steps: dict[str, Step], top: int = 18) -> list[dict[str, Any]]:
    """Milliseconds of one eager step by operator, theirs and ours, the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = torch.cuda.is_available()
    seen: dict[str, dict[str, tuple[float, int]]] = {}
    for name in ("hf eager", "ours eager"):
        steps[name]()
        with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            steps[name]()
        clock = "self_device_time_total" if cuda else "self_cpu_time_total"
        seen[name] = {e.key: (getattr(e, clock) / 1e3, e.count) for e in found.key_averages()}
    theirs, ours = seen.values()
    keys = sorted(theirs | ours, key=lambda k: -max(theirs.get(k, (0, 0))[0], ours.get(k, (0, 0))[0]))
    print(f"\n{'operator':60s}   hf ms calls   ours ms calls")
    rows = []
    for key in [*keys[:top], "all"]:
        pairs = [(sum(v[0] for v in s.values()), 0) if key == "all" else s.get(key, (0.0, 0)) for s in (theirs, ours)]
        print(f"{key[:60]:60s}{pairs[0][0]:8.1f}{pairs[0][1]:6d}{pairs[1][0]:10.1f}{pairs[1][1]:6d}")
        rows.append({"operator": key, "hf": pairs[0], "ours": pairs[1]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=20 if torch.cuda.is_available() else 5)
    parser.add_argument("--threads", type=int, help="of a CPU run")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="tiny tries the script itself")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(f"MAE {options.size} step, batch {options.batch}, {where['device']}, {where['threads']} threads")
    torch.manual_seed(0)
    theirs, ours = models(options.size, device)
    img = torch.randn(options.batch, 3, 224, 224, device=device)
    losses = difference(theirs, ours, img[:8])
    print("loss for the same masks: hf {hf:.6f}, ours {ours:.6f}, difference {difference:.1e}".format(**losses))
    steps = contestants(theirs, ours, img, not (options.no_compile or options.profile))
    record: dict[str, Any] = {"step": "mae", "size": options.size, "batch": options.batch, "losses": losses}
    if options.profile:
        record["profile"] = profile(steps)
    else:
        samples = race(steps, options.rounds)
        record["rows"] = report(samples, peaks(steps), options.batch)
    if options.json:
        write_record(options.json, record)
    return 0 if losses["difference"] < 1e-5 * abs(losses["hf"]) + 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
