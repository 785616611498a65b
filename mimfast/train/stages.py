"""The stages of a run: which crop size and batch size hold at a step, as a closed form with nothing to save.

FastMIM-P (Guo et al., arXiv:2212.06593) enlarges the input while it trains. Stages begin at shares of the run counted
in images, so that a stage of a quarter is a quarter of the epochs whatever its batch size.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from mimfast._check import UserError
from mimfast.recipes import Recipe


@dataclass(frozen=True)
class Stage:
    """Steps of one kind.

    Attributes:
        step: the first one.
        sample: the place in the order of samples that step begins at.
        img_size: side of the crops in pixels.
        batch_size: images per step, over all devices.
    """

    step: int
    sample: int
    img_size: int
    batch_size: int


@dataclass(frozen=True)
class Course:
    """All stages of a run of `steps` steps; without a schedule there is one."""

    steps: int
    stages: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """The stage that a step, counted from 0, belongs to; the last one from the end on."""
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.step) - 1]

    def samples(self, step: int) -> int:
        """Samples used before a step."""
        stage = self.at(step)
        return stage.sample + (step - stage.step) * stage.batch_size

    def clock(self, step: int) -> float:
        """A step as it would be counted if every step had the same number of images; it drives the learning rate."""
        return self.samples(step) * self.steps / self.samples(self.steps)

    def work_left(self, step: int) -> float:
        """Images still to come, each counted by its area in units of those of the step before."""
        side = self.at(max(0, step - 1)).img_size
        ends = [*(stage.step for stage in self.stages[1:]), self.steps]
        return sum(
            max(0, end - max(step, stage.step)) * stage.batch_size * (stage.img_size / side) ** 2
            for stage, end in zip(self.stages, ends)
        )


def course_of(recipe: Recipe, images: int) -> Course:
    """The course of a recipe over a training set of `images` images.

    train.steps fixes the number of steps, train.epochs the number of images; the stages share them.
    """
    sizes, batches, shares = _stages(recipe)
    # steps that each stage would need for its share of one image
    costs = [share / batch for share, batch in zip(shares, batches)]
    steps = recipe.train.steps
    if steps is None:
        total = (recipe.train.epochs or 0) * images
        steps = max(1, math.ceil(sum(share * total / batch for share, batch in zip(shares, batches))))
    stages, step, sample = [], 0, 0
    for i, (size, batch) in enumerate(zip(sizes, batches)):
        stages.append(Stage(step, sample, size, batch))
        end = round(steps * sum(costs[: i + 1]) / sum(costs))
        step, sample = end, sample + (end - step) * batch
    return Course(steps, tuple(stages))


def _stages(recipe: Recipe) -> tuple[list[int], list[int], list[float]]:
    """(sizes, batch sizes, shares of the run) of every stage."""
    progress, whole = recipe.progress, recipe.optim.batch_size
    if not progress.sizes:
        return [recipe.model.img_size], [whole], [1.0]
    starts = progress.starts or tuple(i / len(progress.sizes) for i in range(len(progress.sizes)))
    shares = [end - start for start, end in zip(starts, (*starts[1:], 1.0))]
    return list(progress.sizes), list(progress.batch_sizes) or [whole] * len(shares), shares


def check_shares(recipe: Recipe, course: Course, processes: int) -> None:
    """Raise UserError unless every batch can be shared by the processes."""
    name = "progress.batch_sizes" if recipe.progress.batch_sizes else "optim.batch_size"
    for stage in course.stages:
        if stage.batch_size % processes:
            raise UserError(
                f"pretrain: {name} has {stage.batch_size}, expected a multiple of {processes} because "
                f"{processes} processes share it"
            )


def try_sizes(method: Any, course: Course, device: torch.device) -> None:
    """One forward pass of each size, so that one the network cannot take is told now and not hours later."""
    method.eval()
    for stage in course.stages:
        img = torch.zeros(1, 3, stage.img_size, stage.img_size, dtype=torch.uint8, device=device)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        mask = method.sample_mask(1, sample_ids=first, device=device, img_size=stage.img_size)
        with torch.no_grad():
            method(img, mask)
    method.train()
