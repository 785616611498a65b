"""The command line: `mimfast pretrain | prep | bench | export | doctor`.

Exit codes: 0 done; 1 an error inside mimfast (with traceback); 2 something in the command, the settings or the images
is not usable;
130 stopped by Ctrl-C and 143 stopped by SIGTERM, both with a checkpoint when training had begun.
"""

import os
import signal
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from mimfast.recipes import Recipe

USAGE = """usage: mimfast COMMAND ...

  mimfast pretrain [RECIPE] [--data DIR] [--section.key VALUE ...]   pre-train an encoder
  mimfast prep SRC OUT [--size 256 --format jpeg|raw]                images at training size, in one checked file
  mimfast prep verify OUT                                            find damaged images in it
  mimfast bench data DIR                                             images/s of each decoder, and what limits them
  mimfast export RUN_OR_FILE OUT --layout timm|hf|mae|...            write weights under other names
  mimfast doctor [--markdown]                                        what this machine can run, and why not

`mimfast COMMAND --help` says more. Without RECIPE and --data, pretrain runs on embedded photographs: two CPU cores, a
few minutes.
Exit codes: 0 done, 1 internal error, 2 unusable input, 130 stopped by Ctrl-C, 143 stopped by SIGTERM."""

HELP = """usage: mimfast pretrain [RECIPE] [options] [--section.key VALUE ...]

Pre-train an encoder on a folder of images, and say at the end what it has learnt.

recipes: {recipes}
         (without one: mae_photos; with --data digits: mae_digits; with --data DIR: mae_small)

  --data DIR        folder of images in any tree, tar shards, a store of `mimfast prep`, or "photos" or "digits"; as
                    --data.path
  --out DIR         run folder (default: the first free runs/NAME-N); as --run.out
  --steps N         length of the run; as --train.steps
  --batch-size N    images per step over all devices; as --optim.batch-size
  --seed N          weights, order, crops, masks; as --train.seed
  --device NAME     auto, cpu, cuda, cuda:N; as --train.device
  --resume          continue the run in --out, or the last runs/NAME-N
  --config FILE     TOML settings, laid over the recipe; options on the command line win
  -h, --help        this text, then every setting with the recipe's values

many GPUs: torchrun --nproc-per-node N -m mimfast pretrain ...
exit codes: 0 done, 1 internal error, 2 unusable input, 130 stopped by Ctrl-C, 143 by SIGTERM (both leave a checkpoint)
"""

SHORT = {
    "--data": "--data.path",
    "--out": "--run.out",
    "--steps": "--train.steps",
    "--batch-size": "--optim.batch-size",
    "--seed": "--train.seed",
    "--device": "--train.device",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _route(argv)
    except KeyboardInterrupt:
        print("mimfast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ValueError as error:
        from mimfast._check import UserError

        if not isinstance(error, UserError):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank}: {error}" if rank != "0" else error, file=sys.stderr)
        return 2


def entry() -> int:
    """What the installed command `mimfast` calls."""
    return main()


def _route(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from mimfast import __version__

        print(__version__)
        return 0
    if command == "doctor":
        return _doctor(rest)
    if command in ("pretrain", "prep", "bench", "export"):
        if find_spec("tyro") is None:
            print(
                "mimfast: the command line has no tyro to read its options, expected it installed: pip install tyro",
                file=sys.stderr,
            )
            return 2
        if command == "prep":
            from mimfast.data.command import main as prep

            return prep(rest)
        if command == "bench":
            return _bench(rest)
        return _pretrain(rest) if command == "pretrain" else _export(rest)
    from mimfast._check import UserError
    from mimfast.settings import did_you_mean

    known = ("pretrain", "prep", "bench", "export", "doctor")
    raise UserError(
        f"mimfast: command has {command!r}, expected {', '.join(known)} because no other "
        f"exists{did_you_mean(command, known)}"
    )


def _doctor(rest: list[str]) -> int:
    from mimfast._check import UserError

    if rest in (["-h"], ["--help"]):
        print(
            "usage: mimfast doctor [--markdown]\n\nVersions, devices, what is compiled, and each op's "
            "implementations with the reason for those that are off."
        )
        return 0
    if [token for token in rest if token != "--markdown"]:
        raise UserError(
            f"doctor: the command has {' '.join(rest)!r}, expected nothing or --markdown because it takes no other "
            "option"
        )
    from mimfast.doctor import main as doctor

    return doctor("--markdown" in rest)


def _bench(rest: list[str]) -> int:
    from mimfast._check import UserError

    if rest in ([], ["-h"], ["--help"]):
        print("usage: mimfast bench data DIR\n\nImages a second of each decoder, and what limits them.")
        return 0
    if rest[0] != "data":
        raise UserError(f"bench: what to measure has {rest[0]!r}, expected data because no other bench is a command")
    from mimfast.data.measure import main as measure

    return measure(rest[1:])


def _export(rest: list[str]) -> int:
    import tyro

    from mimfast import layouts
    from mimfast.train import checkpoint

    def export(
        source: Annotated[Path, tyro.conf.Positional],
        out: Annotated[Path, tyro.conf.Positional],
        layout: layouts.Layout = "timm",
    ) -> None:
        """Write weights under somebody else's names.

        Args:
            source: A run folder (its newest checkpoint is used) or a file of weights.
            out: A .safetensors file for timm, a folder for hf, a .pth or .safetensors file for the others.
            layout: timm: encoder for timm; hf: folder for Hugging Face's ViTMAE; mae, fastmim, simmim, maskfeat,
                mixmim, greenmim: that method under the names of its authors' repository.
        """
        newest = checkpoint.newest(source / "checkpoints", lambda text: print(f"warning: {text}", file=sys.stderr))
        model = layouts.load(newest / "model.safetensors" if newest is not None else source)
        print(f"{model.load_report}\nwritten: {layouts.export(model, out, layout)}")

    tyro.cli(export, args=rest, prog="mimfast export")
    return 0


def _pretrain(rest: list[str]) -> int:
    recipe_and_resume = read_command(rest)
    if recipe_and_resume is None:
        return 0
    from mimfast.train.loop import pretrain  # torch: help and mistakes do not wait for it

    outcome = pretrain(*recipe_and_resume)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def read_command(rest: list[str]) -> "tuple[Recipe, bool] | None":
    """(recipe, resume) from the words after `pretrain`, or None when help was asked for and printed.

    The layers are recipe < TOML file < command line. Raises UserError for anything unknown; tyro ends the process for
    a value of the wrong type, with exit code 2 and a message.
    """
    from mimfast import recipes, settings

    name, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)
    wants_help, resume = any(t in ("-h", "--help") for t in rest), "--resume" in rest
    words, given = _expand([token for token in rest if token not in ("-h", "--help", "--resume")])
    config = given.get("--config")
    from_file = settings.read_toml(config) if config is not None else {}
    named = from_file.pop("recipe", None)
    name = named if name is None else name
    base = recipes.by_name(name) if name else recipes.default_for(given.get("--data.path", from_file.get("data.path")))
    stored = None
    if resume and not wants_help:
        stored = _stored(base, name, given.get("--run.out", from_file.get("run.out")))
        base = stored
    elif name is None and config is None and not wants_help:
        more = "; mae_vit_b and larger ones are for GPUs" if base.run.name == "mae_small" else ""
        _tell(f"no recipe named: using {base.run.name}{more}")
    base = settings.override(base, from_file, str(config))
    base = settings.clear_rivals(base, [key.removeprefix("--").replace("-", "_") for key in given])
    recipe = _by_tyro(base, words, wants_help)
    if stored is not None and recipe is not None:
        for change in settings.changed(stored, recipe):
            _tell(f"warning: this run is no longer the one it was, {change}")
    return None if recipe is None else (recipe, resume)


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _stored(base: "Recipe", name: str | None, out: str | None) -> "Recipe":
    """The settings of the run to be resumed: the one in `out`, or the last one of the recipe."""
    from mimfast import settings
    from mimfast._check import UserError
    from mimfast.train import folder

    path = Path(out) if out else folder.last_used(base.run.name)
    if path is None:
        raise UserError(
            "pretrain: --resume has no run to continue, expected --out DIR because there is no "
            f"runs/{base.run.name}-N here"
        )
    config = path / folder.CONFIG
    if not config.is_file():
        raise UserError(
            f"pretrain: --resume has {str(path)!r}, expected the folder of a run because it holds no {folder.CONFIG}"
        )
    stored = settings.override(base, settings.read_toml(config), str(config))
    if name is not None and stored.run.name != base.run.name:
        raise UserError(
            f"pretrain: recipe has {name!r}, expected {stored.run.name!r} because that is the run in {str(path)!r}"
        )
    # the folder may have been moved since
    return settings.override(stored, {"run.out": str(path)}, "--out")


def _by_tyro(base: "Recipe", words: list[str], wants_help: bool) -> "Recipe | None":
    """The words laid over the recipe; None after help."""
    import tyro

    from mimfast import recipes

    if wants_help:
        names = ", ".join(make.__name__ for make in recipes.RECIPES)
        print(HELP.format(recipes=textwrap.fill(names, 108, subsequent_indent=" " * 9)))
    try:
        return tyro.cli(
            recipes.Recipe,
            args=words + (["--help"] if wants_help else []),
            default=base,
            prog="mimfast pretrain",
            description=f"settings, with the values of {base.run.name}",
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as end:
        if wants_help and end.code in (0, None):
            return None
        raise


def _expand(tokens: list[str]) -> tuple[list[str], dict[str, str]]:
    """Write short options out and check every option's name.

    Returns:
        (words, given): what tyro reads, which is everything but --config, and {long option with hyphens: its first
            value}.
    Raises:
        UserError: an option nobody knows, or one without its value.
    """
    from mimfast import settings
    from mimfast._check import UserError

    known = {f"--{key.replace('_', '-')}" for key in settings.known_keys()}
    words: list[str] = []
    given: dict[str, str] = {}
    i = 0
    while i < len(tokens):
        option, equals, value = tokens[i].partition("=")
        i += 1
        if not option.startswith("--"):
            words.append(tokens[i - 1])
            continue
        option = option.replace("_", "-")
        option = SHORT.get(option, option)
        if option not in known and option != "--config":
            every = [*SHORT, "--config", "--resume", *sorted(known)]
            raise UserError(f"pretrain: {option} is not an option{settings.did_you_mean(option, every)}")
        if not equals:
            if i == len(tokens) or tokens[i].startswith("--"):
                raise UserError(f"pretrain: {option} has no value, expected one because it is not a switch")
            value = tokens[i]
            i += 1
        given[option] = value
        if option != "--config":
            words += [option, value]
    return words, given
