"""The training loop: plain torch, one readable pass from recipe to finished run folder.

Nothing here waits for the device within a step: losses and gradient norms stay where they are and are read one
logging interval late.
What a run learns is a pure function of its recipe: order, crops and masks are addressed by (seed, epoch, sample id).
"""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimfast import recipes, report, settings
from mimfast._check import UserError
from mimfast._weights import write_atomically
from mimfast.data.cpu import default_workers, usable_cpus
from mimfast.data.crop import min_decoded_side
from mimfast.data.loader import Batch, Change, Loader
from mimfast.data.resident import Resident, open_resident
from mimfast.data.sources import Source, open_source, split
from mimfast.recipes import Recipe
from mimfast.train import checkpoint, folder, parallel
from mimfast.train.metrics import Log, Meter
from mimfast.train.optim import guarded_step, make_optimizer, set_lr
from mimfast.train.recolour import recolour
from mimfast.train.schedule import lr_at
from mimfast.train.screen import Screen
from mimfast.train.stages import Course, Stage, check_shares, course_of, try_sizes
from mimfast.train.stop import Stop

# steps in a row without a finite gradient after which a run gives up
HOPELESS = 20
# share of an interval spent waiting for images from which on a loader gets more threads, where there are cores left
MUCH = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, the steps done and planned, the signal that stopped it early (or None)."""

    folder: Path
    step: int
    steps: int
    stopped_by: int | None


@dataclass
class _Job:
    """What one process holds while it trains."""

    recipe: Recipe
    world: parallel.World
    screen: Screen
    folder: Path
    method: Any
    optimizer: torch.optim.AdamW
    meter: Meter
    images: int
    course: Course
    step: int = 0
    seconds: float = 0.0
    saved_step: int = -1
    bad_before: list[tuple[str, str]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.course.steps

    def bad(self, loader: Loader) -> list[tuple[str, str]]:
        """(name, reason) of every unreadable image of this run, those before an interruption included."""
        return list(dict.fromkeys([*self.bad_before, *loader.bad.items()]))


def pretrain(recipe: Recipe, resume: bool = False) -> Outcome:
    """Train a recipe to the end and write its report; under torchrun this process is one of several.

    Args:
        recipe: checked first, before anything is written.
        resume: continue the run in recipe.run.out from its newest whole checkpoint; on a CPU the result is the same,
            bit for bit, as without the interruption.
    Returns:
        where the results are. SIGINT and SIGTERM end the run after the present step with a checkpoint.
    Raises:
        UserError: a setting, the images or the run folder cannot be used.
    """
    settings.check(recipe)
    world = parallel.start(recipe.train.device)
    screen = Screen(quiet=not world.first)
    try:
        return _pretrain(recipe, resume, world, screen)
    finally:
        screen.end()
        parallel.finish(world)


def _pretrain(recipe: Recipe, resume: bool, world: parallel.World, screen: Screen) -> Outcome:
    if world.device.type == "cpu":
        _set_threads(spare=1)
    train, held_out = _open(recipe)
    course = course_of(recipe, len(train))
    check_shares(recipe, course, world.size)
    torch.manual_seed(recipe.train.seed)
    # built before the folder is claimed, so that a network that cannot be built leaves nothing behind
    method: Any = recipes.build(recipe).to(world.device)
    optimizer = make_optimizer(
        method, recipe.optim.betas, recipe.optim.weight_decay, getattr(method, "no_decay", frozenset())
    )
    if recipe.progress.sizes:
        try_sizes(method, course, world.device)
    resident = _cache(recipe, course, train, world)
    claim, recipe = _claim(recipe, resume, world)
    try:
        out = Path(str(recipe.run.out))
        job = _Job(recipe, world, screen, out, method, optimizer, Meter(world), len(train), course)
        if resume:
            _restore(job)
        if claim is not None:
            claim.mark("running", job.step, job.steps)
        return _run(job, claim, train, held_out, resident)
    finally:
        if claim is not None:
            claim.release()


def _run(job: _Job, claim: folder.Claim | None, train: Source, held_out: Source, resident: Resident | None) -> Outcome:
    recipe, world = job.recipe, job.world
    workers = recipe.data.workers
    if workers is None:  # on a CPU the network needs the cores, and gets all but one until it is the one that waits
        workers = 1 if world.device.type == "cpu" else _most_workers()
    crop = recipes.crop(recipe)
    first, *later = [Change(s.sample, s.img_size, s.batch_size // world.size) for s in job.course.stages]
    start = job.course.samples(job.step)
    with Loader(
        train, first.size, first.batch_size, recipe.train.seed, start, workers, crop, world.rank, world.size,
        changes=later, decoder=recipe.data.decoder, repeat=recipe.data.repeat, pin=world.device.type == "cuda",
        resident=resident, device=world.device,
    ) as loader:  # fmt: skip
        _introduce(job, train, held_out)
        if resident is not None and resident.plan is not None:
            job.screen.say(resident.plan.sentence)
        with Stop() as stop:
            _loop(job, loader, stop)
        bad = job.bad(loader)
    if claim is not None:
        _conclude(job, claim, train, held_out, bad)
    return Outcome(job.folder, job.step, job.steps, stop.signal if job.step < job.steps else None)


def _set_threads(spare: int) -> None:
    # torch counts the cores of the machine, a container may have fewer. Its threads wait for each other many times a
    # step, so one that shares its core with a loader thread slows all of them: a core is left free, for any number of
    # workers, because the number of threads may change the last bit of a sum
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, int(usable_cpus()) // parallel.local_size() - spare))


def _most_workers() -> int:
    """Loader threads for one process of this machine."""
    return max(1, default_workers() // parallel.local_size())


def _cache(recipe: Recipe, course: Course, train: Source, world: parallel.World) -> Resident | None:
    """Memory for the images, set aside after the network and before the run folder is claimed."""
    largest = max(stage.img_size for stage in course.stages)
    side, data = min_decoded_side(largest, recipes.crop(recipe)), recipe.data
    return open_resident(train, data.cache, data.cache_side, side, world.device, parallel.local_size(), world.wait)


def _open(recipe: Recipe) -> tuple[Source, Source]:
    """(images to train on, held-out images)."""
    source = open_source(recipe.data.path)
    if recipe.data.eval is None:
        return split(source, recipe.data.holdout)
    held_out = open_source(recipe.data.eval)
    if recipe.data.labels and held_out.classes != source.classes and held_out.classes and source.classes:
        odd = sorted(set(held_out.classes) ^ set(source.classes))
        raise UserError(
            f"pretrain: data.eval has {len(held_out.classes)} class folders, expected the {len(source.classes)} of "
            "data.path because "
            f"labels are compared by name ({odd[0]!r} is in one of them only); --data.labels False leaves the "
            "probes out"
        )
    return source, held_out


def _claim(recipe: Recipe, resume: bool, world: parallel.World) -> tuple[folder.Claim | None, Recipe]:
    """The first rank takes the folder and writes the resolved configuration; all learn its name."""
    claim = None
    out = recipe.run.out or ""
    if world.first:
        path = Path(out) if out else folder.next_free(recipe.run.name)
        claim, out = folder.Claim(path, resume), str(path)
    out = world.share(out)
    recipe = replace(recipe, run=replace(recipe.run, out=out))
    if claim is not None:
        heading = (
            "The settings of this run, complete. To repeat it: mimfast pretrain --config THIS_FILE --out NEW_FOLDER"
        )
        text = settings.to_toml(recipe, heading)
        write_atomically(claim.path / folder.CONFIG, lambda draft: draft.write_text(text, encoding="utf-8"))
    return claim, recipe


def _introduce(job: _Job, train: Source, held_out: Source) -> None:
    recipe, world = job.recipe, job.world
    weights = sum(p.numel() for p in job.method.parameters())
    batches = ", ".join(map(str, dict.fromkeys(stage.batch_size for stage in job.course.stages)))
    where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    say = job.screen.say
    say(f"{recipe.run.name}: {recipe.data.path}, {len(train)} images to train on, {len(held_out)} held out")
    say(
        f"{recipes.describe(recipe)}, {weights / 1e6:.2f} M parameters; {recipes.sizes(recipe)}, "
        f"{100 * recipe.mask.ratio:g} % hidden; {job.steps} steps of {batches}, "
        f"{'bf16' if _bf16(job) else 'fp32'} on {where}"
    )
    say(f"run folder: {job.folder}" + (f", continued from step {job.step}" if job.step else ""))


def _loop(job: _Job, loader: Loader, stop: Stop) -> None:
    recipe = job.recipe
    optim, train = recipe.optim, recipe.train
    model: Any = job.world.wrap(job.method)
    # each stage gets code for its own size
    model = torch.compile(model, dynamic=False if recipe.progress.sizes else None) if train.compile else model
    params = [p for p in job.method.parameters() if p.requires_grad]
    log = Log(job.folder, recipe.run.tensorboard, job.step) if job.world.first else None
    began, saved = time.monotonic() - job.seconds, time.monotonic()
    job.meter.watch(loader.clock)
    job.screen.begin(job.step, job.steps)
    stopping = False
    while job.step < job.steps and not stopping:
        batch = next(loader)
        stage = job.course.at(job.step)
        lr = _lr(job, stage)
        set_lr(job.optimizer, lr)
        job.optimizer.zero_grad(set_to_none=True)
        loss = _loss(job, model, batch)
        loss.backward()
        norm, skipped = guarded_step(job.optimizer, params, optim.clip)
        job.step += 1
        job.seconds = time.monotonic() - began
        job.meter.add(loss, norm, skipped, stage.batch_size)
        job.screen.step(job.step)
        # a single process stops at once; several agree through the sums of a logging interval
        stopping = job.world.size == 1 and stop.signal is not None
        if job.step % train.log_every == 0 or job.step == job.steps:
            line = job.meter.flush(_about(job, loader, stage, lr), stop.signal is not None)
            stopping = _show(job, log, line) or stopping
            # the first interval, before there is a line, holds the start-up
            if line is not None and job.meter.waited > MUCH and recipe.data.workers is None:
                loader.resize(min(2 * loader.workers, _most_workers()))
        if _due(job, saved) and not stopping:
            _show(job, log, job.meter.take())
            _commit(job, loader)
            saved = time.monotonic()
    _show(job, log, job.meter.take())
    _commit(job, loader)
    job.screen.end()
    if log is not None:
        log.close()


def _lr(job: _Job, stage: Stage) -> float:
    optim, step = job.recipe.optim, job.course.clock(job.step)
    peak = recipes.peak_lr(job.recipe, stage.batch_size)
    return lr_at(step, job.steps, peak, optim.min_lr, optim.warmup, optim.warmup_lr, optim.schedule, optim.milestones)


def _loss(job: _Job, model: Any, batch: Batch) -> Tensor:
    device = job.world.device
    began = time.perf_counter()
    img, ids, epochs = (x.to(device, non_blocking=True) for x in (batch.img, batch.sample_ids, batch.epochs))
    # the time of the host alone: the copy itself goes on while the step is being launched
    job.meter.clock.add("transfer", time.perf_counter() - began, len(ids))
    seed = job.recipe.train.seed
    img = recolour(img, ids, epochs, seed, job.recipe.data.recolour)
    live = {"img_size": img.shape[-1]} if job.recipe.progress.sizes else {}
    if getattr(job.method, "plans_on_cpu", False):  # from what is there already: nothing waits
        ids, epochs = batch.sample_ids, batch.epochs
    mask = job.method.sample_mask(len(ids), sample_ids=ids, seed=seed, epoch=epochs, device=device, **live)
    with torch.autocast(device.type, torch.bfloat16, enabled=_bf16(job)):
        return model(img, mask)


def _bf16(job: _Job) -> bool:
    wanted = job.recipe.train.precision
    if wanted == "auto":
        return job.world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return wanted == "bf16"


def _about(job: _Job, loader: Loader, stage: Stage, lr: float) -> dict[str, Any]:
    return {
        "step": job.step,
        "epoch": job.course.samples(job.step) / job.images,
        "lr": lr,
        "img_size": stage.img_size,
        "batch_size": stage.batch_size,
        "seconds": round(job.seconds, 3),
        "bad_images": len(job.bad(loader)),
    }


def _show(job: _Job, log: Log | None, line: dict[str, Any] | None) -> bool:
    """Print and write one line; returns whether any rank wants to stop. Raises UserError for a hopeless run."""
    if line is None:
        return False
    stop = line.pop("stop")
    if log is not None:
        try:
            log.write(line)
        except OSError as error:
            job.screen.warn(f"metrics.jsonl misses step {line['step']}: {error.strerror or error}")
    job.screen.line(line, job.steps, job.course.work_left(line["step"]))
    if line["skipped_in_a_row"] >= HOPELESS:
        raise UserError(
            f"pretrain: the gradient has {line['skipped_in_a_row']} steps in a row that are not finite, up to step "
            f"{line['step']}, expected "
            "finite numbers because no step is applied without them; the weights are those before, try a lower "
            "optim.lr or set optim.clip"
        )
    return stop


def _due(job: _Job, saved: float) -> bool:
    train = job.recipe.train
    by_step = train.checkpoint_steps > 0 and job.step % train.checkpoint_steps == 0
    return by_step or (train.checkpoint_minutes > 0 and time.monotonic() - saved > 60 * train.checkpoint_minutes)


def _commit(job: _Job, loader: Loader) -> None:
    """Save a checkpoint on the first rank. A full disk is reported and the run goes on with the checkpoints it has."""
    if not job.world.first or job.saved_step == job.step:
        return
    state = {
        "optimizer": job.optimizer.state_dict(),
        "meter": job.meter.state(),
        "rng": torch.get_rng_state(),
        "seconds": job.seconds,
        "bad": [list(pair) for pair in job.bad(loader)],
    }
    about = {
        "images": job.images,
        "fingerprint": settings.fingerprint(job.recipe),
        "config": recipes.as_dict(job.recipe),
        "versions": report.versions(),
    }
    weights, config = job.method.state_dict(), job.method.config
    try:
        checkpoint.save(job.folder / "checkpoints", job.step, weights, config, state, about, job.recipe.train.keep)
        job.saved_step = job.step
    except OSError as error:
        job.screen.warn(
            f"the checkpoint of step {job.step} could not be written ({error.strerror or error}); earlier ones are "
            "untouched and the run goes on"
        )


def _restore(job: _Job) -> None:
    """Put everything where the newest whole checkpoint left it; without one, begin at step 0."""
    path = checkpoint.newest(job.folder / "checkpoints", job.screen.warn)
    if path is None:
        job.screen.warn(f"{job.folder} holds no whole checkpoint; the run begins again at step 0")
        return
    weights, state, manifest = checkpoint.load(path)
    job.method.load_state_dict(weights)
    job.optimizer.load_state_dict(state["optimizer"])
    # every rank takes the first one's sums: equal counters, and a mean loss of the open interval from its share of
    # the images
    job.meter.restore(state["meter"])
    torch.set_rng_state(state["rng"])
    job.step = job.saved_step = manifest["step"]
    job.seconds = state["seconds"]
    job.bad_before = [(name, reason) for name, reason in state["bad"]]
    if manifest["images"] != job.images:
        job.screen.warn(
            f"{manifest['images']} training images when the run began, {job.images} now: their order is another one "
            "from here on"
        )


def _conclude(job: _Job, claim: folder.Claim, train: Source, held_out: Source, bad: list[tuple[str, str]]) -> None:
    if job.step < job.steps:
        claim.mark("stopped", job.step, job.steps)
        job.screen.say(
            f"stopped at step {job.step} of {job.steps}; continue with: mimfast pretrain --resume --out {job.folder}"
        )
        return
    if job.world.device.type == "cpu":
        _set_threads(spare=0)
    facts = report.Facts(job.recipe, job.folder, job.steps, job.seconds, len(train), len(held_out), bad)
    report.conclude(facts, job.method, train, held_out, job.world.device, job.screen)
    claim.mark("finished", job.step, job.steps)
