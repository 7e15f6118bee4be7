"""The command `dynkp train`: its options, read from a recipe and the command line, and their help."""

from __future__ import annotations

import argparse
import inspect
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from dynkp import PostConfig
from dynkp.cli.arguments import OneLineErrors
from dynkp.cli.errors import Interrupted, RunFailedError, hide_library_bars, log_to_stderr
from dynkp.data.choices import did_you_mean
from dynkp.data.paths import check_path
from dynkp.models.checkpoints import check_available
from dynkp.recipes.catalog import find_recipe, recipes
from dynkp.training import drawn_posts
from dynkp.training.closing import wrapped
from dynkp.training.options import (
    FROM_SCRATCH,
    METHODS,
    DataArguments,
    PredictionArguments,
    TinyModelArguments,
    TrainingOptions,
    check_method,
)

DESCRIPTION = """\
Train a model to predict keyphrases, predict the evaluation posts, score them.

--method chooses how: dynamic_cot (the default; --strategy direct is plain fine-tuning), aimkp, dynamic_aimkp (both in
one), or mulcot_rd (response chains and sentiments). `dynkp train --method aimkp --help` shows that method's options.

Without a recipe and without posts, posts are drawn, a small model is trained on them from scratch, once on direct
targets and once with Dynamic CoT, and the two are compared: a few minutes on two cores, nothing downloaded.

Every run leaves predictions.jsonl and metrics.json in --output_dir, beside the model and its checkpoints. The model is
saved with its task, which `dynkp predict` follows. --resume_from_checkpoint last continues an interrupted run."""

EPILOG = """\
examples:
  dynkp train --train_file train.jsonl --eval_file test.jsonl --image_dir images --output_dir out
      your own posts (JSONL rows: id, text, keyphrases, image, rationale), and a small model from scratch
  accelerate launch -m dynkp train --recipe mmkp_dynamic_cot_qwen2_5_vl_3b --train_file train.jsonl \\
      --eval_file test.jsonl --image_dir images --gamma avg
      a paper's settings, on as many GPUs as there are; every option on the command line wins over the recipe
  dynkp train --method aimkp --train_file train.jsonl --eval_file test.jsonl --image_dir images \\
      --eval_modalities both text image
      a model that masks, and what it predicts from either modality alone (AimKP's Table 1)
  dynkp train --train_file train.jsonl --output_dir out --resume_from_checkpoint last
      the first of these, continued
"""

_STORE_FALSE = argparse._StoreFalseAction

# What most runs set of the options that the help leaves to --help-all.
MOST_USED = (
    *("model_name_or_path", "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "bf16", "use_cpu", "use_peft", "eval_strategy", "save_strategy"),
    *("logging_steps", "resume_from_checkpoint", "seed"),
)


class TrainParser(OneLineErrors, TrlParser):
    """The parser of one method's options.

    Args:
        method: the method, a key of `METHODS`.

    Raises:
        ValueError: if there is no such method.
    """

    def __init__(self, method: str = "dynamic_cot") -> None:
        check_method(method)
        self.method = method
        self.config_class = METHODS[method][1]
        TrlParser.__init__(
            self,
            (DataArguments, self.config_class, ModelConfig, PredictionArguments, TinyModelArguments),
            prog="dynkp train",
            usage="dynkp train [--recipe NAME | --config FILE] [--method METHOD] [options]",
            description=DESCRIPTION,
            epilog=EPILOG,
            formatter_class=_Formatter,
            add_help=False,
            allow_abbrev=False,  # the defaults depend on which options are named, by their whole names
        )
        _add_selection(self)
        (debug,) = (action for action in self._actions if action.dest == "debug")
        debug.nargs, debug.const = "?", debug.default
        debug.help = "Show the traceback of an error. With a value, transformers' option of this name."

    def format_help(self) -> str:
        """Write the help: the method's own options, those of the data, then those that all methods share."""
        return self._help(everything=False)

    def format_help_all(self) -> str:
        """Write the help with all options of TRL and transformers."""
        return self._help(everything=True)

    def format_own_help(self) -> str:
        """Write the help of the options that only this method has, or whose defaults it changes."""
        actions = {action.dest: action for action in reversed(self._actions) if not isinstance(action, _STORE_FALSE)}
        formatter = self._get_formatter()
        formatter.start_section(f"dynkp train --method {self.method}")
        formatter.add_arguments([actions[name] for name in self._of_method()])
        formatter.end_section()
        return formatter.format_help()

    def _help(self, everything: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        # Without the `--no_x` that HfArgumentParser adds to each `--x` which is true by default.
        actions = {action.dest: action for action in reversed(self._actions) if not isinstance(action, _STORE_FALSE)}
        for title, names in self._sections(everything):
            formatter.start_section(title)
            formatter.add_arguments([actions.pop(name) for name in names if name in actions])
            formatter.end_section()
        if not everything:
            names = ", ".join(f"--{name}" for name in MOST_USED)
            formatter.add_text(wrapped(f"TRL's and transformers' options: `--help-all`. Most used: {names}."))
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _sections(self, everything: bool) -> Iterator[tuple[str, Sequence[str]]]:
        """Titles and the options below them; an option belongs to the first section that names it."""
        yield "what to run", ("method", "recipe", "config", "help", "help_all", "debug")
        yield f"options of the method {self.method}", self._of_method()
        yield "posts", ("train_file", "eval_file", "eval_posts", "image_dir", *_names(DataArguments))
        yield "prediction after the training", _names(PredictionArguments)
        common = [name for name in PostConfig.__annotations__ if everything or name != "remove_unused_columns"]
        yield "options of all methods", common
        yield "the small model that is built where none is named", _names(TinyModelArguments)
        if everything:
            yield "model, precision and adapters (TRL)", _names(ModelConfig)
            yield "training (TRL and transformers)", _names(self.config_class)

    def _of_method(self) -> list[str]:
        """The options that the method's configurations declare: first those that only they have, then changed defaults."""
        ancestors = [cls for cls in self.config_class.__mro__ if issubclass(cls, PostConfig) and cls is not PostConfig]
        declared = [name for cls in ancestors for name in inspect.get_annotations(cls) if not name.startswith("_")]
        return sorted(declared, key=lambda name: name in PostConfig.__dataclass_fields__)

    def read(self, argv: Sequence[str], config: Mapping[str, Any], source: str = "") -> TrainingOptions:
        """Read the options.

        Args:
            argv: the command line.
            config: settings of a recipe, which the command line overrides.
            source: what an error calls the recipe.

        Returns:
            All options, checked one by one and, within each configuration, together.

        Raises:
            ValueError: if the recipe has an option that there is not, or options contradict one another.
            FileNotFoundError: if the model does not exist.
            SystemExit: if the command line cannot be understood.
        """
        config = dict(config)
        for name, value in (config.pop("env", None) or {}).items():
            os.environ[name] = str(value)
        self.set_defaults_with_config(**config)
        known = {action.dest for action in self._actions}
        if unknown := [name for name in config if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"{source} has `{unknown[0]}`, which is no option of method {self.method!r}.{hint}")
        named = self.parse_args(list(argv))
        if named.model_name_or_path:  # before transformers objects to a GPU option, and before any post is read
            check_available(named.model_name_or_path, "--model_name_or_path", named.model_revision)
        for name in ("train_file", "eval_file", "image_dir", "eval_image_dir"):
            if value := getattr(named, name):
                is_folder = name.endswith("_dir")
                check_path(value, f"--{name}", "folder" if is_folder else "file or folder", or_hub_id=not is_folder)
        data, args, model, prediction, tiny, *_ = self.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
        return TrainingOptions(data, args, model, prediction, tiny)


def _names(configuration: Any) -> list[str]:
    return [field.name for field in fields(configuration)]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Options under one spelling, with the default where the text does not name it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if len(option) == 2 or "-" not in option[2:]]
        names = ", ".join(options or action.option_strings[:1])
        if action.nargs == 0:
            return names
        if action.choices is not None:
            return f"{names} {self._metavar_formatter(action, action.dest.upper())(1)[0]}"
        return f"{names} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or "default" in text.lower() or action.nargs == 0:
            return text
        return f"{text} Default: %(default)s."


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide which other options there are, and what is done with them."""
    parser.add_argument("--recipe", metavar="NAME", help="An installed recipe; `dynkp recipes` lists them.")
    parser.add_argument("--config", metavar="FILE", help="A recipe of your own: YAML, an option per line.")
    parser.add_argument("-h", "--help", action="store_true", help="Show this help.")
    parser.add_argument("--help-all", action="store_true", help="Show all options, those of TRL and transformers too.")


def parser() -> TrainParser:
    """Build the parser of the default method; docs/cli.md is made of its help."""
    return TrainParser()


def reference() -> list[str]:
    """Write what docs/cli.md shows: the help of the default method, and of the others their own options."""
    return [TrainParser().format_help(), *(TrainParser(method).format_own_help() for method in list(METHODS)[1:])]


def read_options(argv: Sequence[str]) -> TrainingOptions | None:
    """Read the recipe and the command line.

    Args:
        argv: the arguments after `dynkp train`.

    Returns:
        The options; None where the help was asked for, and has been printed.

    Raises:
        ValueError, FileNotFoundError: naming the option that is wrong.
        SystemExit: if the command line cannot be understood.
    """
    first = OneLineErrors(prog="dynkp train", add_help=False, allow_abbrev=False)
    _add_selection(first)
    first.add_argument("--method")
    chosen, _ = first.parse_known_args(list(argv))
    if chosen.recipe and chosen.config:
        first.error(f"--recipe {chosen.recipe} and --config {chosen.config}: give one of them")
    file, source = chosen.config, f"--config {chosen.config}"
    if chosen.recipe:
        file, source = str(find_recipe(chosen.recipe, "training").path), f"--recipe {chosen.recipe}"
    config = read_config(file, source) if file else {}
    parser = TrainParser(chosen.method or config.get("method", "dynamic_cot"))
    if chosen.help or chosen.help_all:
        print(parser.format_help_all() if chosen.help_all else parser.format_help(), end="")
        return None
    named = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    from_recipe = {"config", "recipe"}
    if not named & {"model_name_or_path", *from_recipe}:
        parser.set_defaults_with_config(**FROM_SCRATCH)
    if not named & {"train_file", "datasets", *from_recipe}:
        parser.set_defaults_with_config(**drawn_posts.DEFAULTS)
    return parser.read(argv, config, source)


def read_config(file: str, source: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        file: YAML.
        source: what an error calls it.

    Raises:
        FileNotFoundError: if there is no such file, naming the installed recipe of that name, if there is one.
        ValueError: if it is no YAML, or no mapping of options to values.
    """
    if not Path(file).is_file():
        names = [recipe.name for recipe in recipes("training")]
        hint = f" `--recipe {Path(file).stem}` is installed." if Path(file).stem in names else ""
        raise FileNotFoundError(f"{source}: there is no such file.{hint}")
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source} must be a mapping of options to values, such as `strategy: dynamic`")
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp train`.

    Args:
        argv: the arguments after `dynkp train`; those of the process if None.

    Raises:
        ValueError, OSError: if options, posts or model are wrong.
        Interrupted: after Ctrl-C, with the command that continues the run.
        RunFailedError: if there is too little memory.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    log_to_stderr()
    options = read_options(argv)
    if options is None:
        return
    if options.args.disable_tqdm:
        hide_library_bars()
    import torch

    from dynkp.training.run import train

    try:
        train(options)
    except KeyboardInterrupt as error:
        how = "the same command starts again" if options.draws_posts else how_to_continue(argv, options.args.output_dir)
        raise Interrupted(how) from error
    except torch.OutOfMemoryError as error:
        raise RunFailedError(
            f"out of memory ({' '.join(str(error).split())[:200]}). Lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps, which gives the same training; --activation_checkpointing true and --use_peft true "
            "need less too"
        ) from error


def how_to_continue(argv: Sequence[str], output_dir: str) -> str:
    """Describe how an interrupted run is continued.

    Args:
        argv: the arguments of the run.
        output_dir: the folder of its checkpoints.

    Returns:
        The rest of the sentence "interrupted; ...".
    """
    from dynkp.trainer.durable_checkpoints import last_complete_checkpoint

    try:
        checkpoint = last_complete_checkpoint(output_dir)
    except ValueError:
        return f"there is no checkpoint in {output_dir} yet, so the same command starts again (--save_steps N saves sooner)"
    kept = [word for word in argv if not word.startswith(("--resume_from_checkpoint=", "--resume-from-checkpoint="))]
    for option in ("--resume_from_checkpoint", "--resume-from-checkpoint"):
        while option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    words = shlex.join([*kept, "--resume_from_checkpoint", "last"])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        words = f"the same launcher and `-m dynkp train {words}`"
    else:
        words = f"`{_program()} {words}`"
    return f"{checkpoint} is saved; continue with {words}"


def _program() -> str:
    script = sys.argv[0]
    return f"python {script}" if Path(script).name == "train.py" else "dynkp train"
