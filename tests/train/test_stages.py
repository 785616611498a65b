"""Which size and batch holds at a step: one closed form, the same for runs counted in steps and in epochs."""

from dataclasses import replace

import pytest

from mimfast import recipes, settings
from mimfast._check import UserError
from mimfast.recipes import Model, Optim, Progress, Recipe, Train
from mimfast.train.stages import course_of


def _recipe(sizes=(), batches=(), starts=(), batch=16, **train):
    return Recipe(
        model=Model("fastmim", img_size=sizes[-1] if sizes else 64),
        optim=Optim(batch_size=batch),
        progress=Progress(sizes, batches, starts),
        train=Train(**train),
    )


def test_without_a_schedule_there_is_one_stage():
    course = course_of(_recipe(epochs=3), images=100)
    assert course.steps == 19
    assert [(s.step, s.sample, s.img_size, s.batch_size) for s in course.stages] == [(0, 0, 64, 16)]
    # bit for bit the step itself, so that the learning rate is what it was without stages
    assert [course.clock(step) for step in range(20)] == list(range(20))
    assert [course.samples(step) for step in (0, 1, 19)] == [0, 16, 304]
    assert course.work_left(18) == 16


def test_stages_take_their_share_of_the_images():
    course = course_of(_recipe((32, 48, 64), (16, 8, 4), (0.0, 0.5, 0.75), epochs=8), images=100)
    # 400 images of 16, 200 of 8, 200 of 4
    assert course.steps == 25 + 25 + 50
    assert [(s.step, s.sample) for s in course.stages] == [(0, 0), (25, 400), (50, 600)]
    assert [course.at(step).img_size for step in (0, 24, 25, 49, 50, 99, 100)] == [32, 32, 48, 48, 64, 64, 64]
    assert course.samples(100) == 800
    assert course.clock(25) == pytest.approx(50)
    assert course.work_left(50) == pytest.approx(200 * (64 / 48) ** 2)
    assert course.work_left(100) == 0


def test_steps_are_shared_in_the_same_way():
    course = course_of(_recipe((32, 48, 64), (16, 8, 4), (0.0, 0.5, 0.75), steps=100), images=7)
    assert [s.step for s in course.stages] == [0, 25, 50]
    assert [s.batch_size for s in course_of(_recipe((32, 64), steps=9), images=7).stages] == [16, 16]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1001])
def test_every_step_begins_where_the_last_one_ended(steps):
    course = course_of(_recipe((16, 24, 32, 40), (12, 7, 5, 3), (0.0, 0.1, 0.4, 0.8), steps=steps), images=11)
    used = 0
    for step in range(steps):
        assert course.samples(step) == used
        used += course.at(step).batch_size
    assert course.samples(steps) == used
    assert course.clock(0) == 0
    assert course.clock(steps) == steps
    assert [s.step for s in course.stages] == sorted(s.step for s in course.stages)


def test_the_peak_learning_rate_follows_the_batch_unless_it_is_fixed():
    recipe = _recipe((32, 64), (64, 16), steps=4)
    recipe = replace(recipe, optim=replace(recipe.optim, base_lr=1.0))
    assert [recipes.peak_lr(recipe, batch) for batch in (64, 16)] == [0.25, 0.0625]
    fixed = replace(recipe, optim=replace(recipe.optim, lr=3.0))
    assert recipes.peak_lr(fixed, 64) == 3.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.method": "mae"}, "progress.sizes has (32, 64), expected none because MAE's encoder sees one size"),
        ({"model.img_size": 128}, "model.img_size has 128, expected 64 because it is the last of progress.sizes"),
        ({"progress.sizes": [0, 64]}, "progress.sizes has (0, 64), expected positive numbers"),
        ({"progress.sizes": [32, 6.5]}, "progress.sizes has 6.5 in test, expected a whole number"),
        ({"progress.batch_sizes": [4]}, "progress.batch_sizes has (4,), expected 2 numbers or none"),
        ({"progress.batch_sizes": [4, 0]}, "progress.batch_sizes has (4, 0), expected 1 or more"),
        ({"progress.starts": [0.0]}, "progress.starts has (0.0,), expected 2 numbers or none"),
        ({"progress.starts": [0.1, 0.5]}, "progress.starts has (0.1, 0.5), expected 0 first"),
        ({"progress.starts": [0.0, 1.0]}, "progress.starts has (0.0, 1.0), expected 0 first"),
        (
            {"progress.sizes": [], "progress.starts": [0.0]},
            "progress.starts has (0.0,), expected none because there is",
        ),
        ({"optim.milestones": [0.5]}, "optim.milestones has (0.5,), expected none because optim.schedule is 'cosine'"),
        (
            {"optim.schedule": "multistep", "optim.milestones": [0.5, 0.5]},
            "optim.milestones has (0.5, 0.5), expected ascending fractions",
        ),
        ({"optim.warmup_lr": -1.0}, "optim.warmup_lr has -1.0"),
        ({"model.drop_path": 1.0}, "model.drop_path has 1.0"),
        ({"progress.sizes": [], "model.method": "mae", "model.drop_last": 2}, "model.drop_last has 2, expected 0"),
    ],
)
def test_wrong_schedules_are_named(given, message):
    with pytest.raises(UserError) as told:
        settings.check(settings.override(_recipe((32, 64), steps=4), given, "test"))
    assert message in str(told.value)
