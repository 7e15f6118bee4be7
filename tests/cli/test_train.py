"""Invariants of `dynkp train`:

- it trains from any folder, as a command, as a module and through examples/train.py, by recipe or by options;
- the help of a method begins with the method's own options and leaves TRL's and transformers' to `--help-all`;
- a mistake is one line on standard error with a suggestion, exit status 2 and, with `--debug`, a traceback; a wrong model is
  found before posts are read and before transformers looks at the device;
- Ctrl-C ends in one line with the command that continues, and that command does continue;
- the opening lines say what is trained on what, the closing table fits 80 columns, and a result without any keyphrase says
  what to look at; libraries print nothing on standard output.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynkp import cli
from dynkp.cli import train
from dynkp.cli.errors import RunFailedError
from dynkp.models.saved_task import FILE
from dynkp.recipes.catalog import recipes
from dynkp.training.options import METHODS
from tests.conftest import REPOSITORY
from tests.support.training_runs import QUICK, TINY, read_jsonl, write_jsonl

WORDS = ("beagle", "harbour", "guitar", "marathon")
POSTS = [
    {"id": str(index), "text": f"post {index} about a {WORDS[index % 4]}", "keyphrases": [WORDS[index % 4]]}
    for index in range(8)
]


@pytest.fixture
def posts(tmp_path: Path) -> list[str]:
    """A folder with posts to train and to evaluate on, as options."""
    file = write_jsonl(tmp_path / "posts.jsonl", POSTS)
    return ["--train_file", file, "--eval_file", file, "--output_dir", str(tmp_path / "out")]


def start(*command: str, folder: Path) -> subprocess.Popen[str]:
    """Start a program in a folder outside the checkout; Ctrl-C reaches it even where it would not reach this process."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


# --- where it runs ---


@pytest.mark.parametrize(
    "program", [["-m", "dynkp", "train"], [str(REPOSITORY / "examples/train.py")]], ids=["module", "script"]
)
def test_it_trains_from_another_folder(program: list[str], posts: list[str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    process = start(*program, *posts, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "2", folder=tmp_path / "elsewhere")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert len(read_jsonl(tmp_path / "out/predictions.jsonl")) == 8 and (tmp_path / "out" / FILE).exists()
    # Results alone are on standard output: Trainer's logs and the table.
    lines = [line for line in out.splitlines() if line and not line.startswith("{")]
    assert lines[0].split() == ["system", "F1@1", "seen", "unseen", "P@1", "reason", "words", "empty"]
    assert max(map(len, lines)) <= 80
    for name in ("Method:   dynamic_cot (strategy direct), task dynamic_cot", "Model:    from scratch, ", "Output:   "):
        assert name in err
    assert "Posts:    8: 0 with and 8 without image, 0 with rationale; evaluation: 8" in err
    assert "Training: 2 optimizer steps of 8 posts (2 epochs)" in err
    assert "USDT" not in err + out and "real_accelerator" not in err + out


@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes("training")])
def test_it_trains_with_a_recipe(recipe: str, posts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the recipe reaches the trainer's configuration; the model is not looked for."""
    monkeypatch.setattr(train, "check_available", lambda *args: None)
    more = [*posts, "--use_cpu", "true", "--bf16", "false", "--logging_steps", "7"]
    options = train.read_options(["--recipe", recipe, *more])
    assert options is not None and options.args.logging_steps == 7
    # As users of a checkout name it.
    as_a_file = train.read_options(["--config", str(REPOSITORY / f"examples/recipes/{recipe}.yaml"), *more])
    assert as_a_file is not None and as_a_file.args.to_dict() == options.args.to_dict()
    found = next(one for one in recipes("training") if one.name == recipe)
    assert (options.data.method, options.model.model_name_or_path) == (found.method, found.model)
    settings = yaml.safe_load(found.path.read_text())
    for name in ("num_train_epochs", "learning_rate"):
        assert getattr(options.args, name) == settings[name]


def test_a_recipe_trains_a_saved_model(posts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The settings of a paper, on the tiny model: what was written by one run is a model for the next."""
    train.main([*posts, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "1"])
    again = [word.replace(str(tmp_path / "out"), str(tmp_path / "again")) for word in posts]
    more = ["--model_name_or_path", str(tmp_path / "out"), "--bf16", "false", "--max_steps", "1", "--eval_strategy", "no"]
    more += ["--load_best_model_at_end", "false", "--per_device_train_batch_size", "4", "--modality", "text"]
    assert cli.main(["train", "--recipe", "cmkp_aimkp_llava_1_5_7b", *again, *QUICK, *more]) == 0
    (replaced,) = [record.message for record in caplog.records if "this run replaces" in record.message]
    assert "with task 'dynamic_cot' (method dynamic_cot, modality both), which this run replaces with 'aimkp'" in replaced
    adapter = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert adapter["r"] == 128 and adapter["modules_to_save"] == ["multi_modal_projector"]
    saved = json.loads((tmp_path / "again" / FILE).read_text())
    assert (saved["method"], saved["task"]["name"], saved["task"]["separator"]) == ("aimkp", "aimkp", ", ")


# --- help ---


def sections(text: str) -> dict[str, list[str]]:
    """Title -> options, in the order of the help."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"([\w'].*):", line):
            title = match[1]
        elif match := re.match(r"  (?:-h, )?--([\w-]+)", line):
            found.setdefault(title, []).append(match[1])
    return found


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dynamic_cot", ["strategy", "gamma"]),
        ("aimkp", ["text_threshold", "image_threshold"]),
        ("dynamic_aimkp", ["text_threshold", "strategy", "gamma"]),
        ("mulcot_rd", ["task_weights", "distillation_weight"]),
    ],
)
def test_help_begins_with_the_methods_own_options(method: str, own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--method", method, "--help"]) == 0
    text = capsys.readouterr().out
    found = sections(text)
    titles = list(found)
    assert titles[:4] == ["what to run", f"options of the method {method}", "posts", "prediction after the training"]
    assert titles[4] == "options of all methods" and found["posts"][0] == "train_file"
    options = [name for title in titles for name in found[title]]
    assert len(options) == len(set(options)), "each option stands once"
    assert set(own) <= set(found[titles[1]]) and own[0] in found[titles[1]][:2]
    lines = text.splitlines()
    assert next(index for index, line in enumerate(lines) if line.startswith(f"  --{own[0]} ")) < 60
    assert "TRL's and transformers' options: `--help-all`." in " ".join(text.split())
    assert "adam_beta1" not in text and len(lines) < 300


def test_help_all_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help-all"]) == 0
    named = {name for names in sections(capsys.readouterr().out).values() for name in names}
    actions = train.TrainParser()._actions
    assert {action.dest for action in actions} <= {name.replace("-", "_") for name in named}
    assert {"adam_beta1", "lora_r", "gamma", "remove_unused_columns"} <= named


def test_a_recipe_decides_which_options_the_help_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "cmkp_aimkp_llava_1_5_7b", "--help"]) == 0
    assert "options of the method aimkp" in capsys.readouterr().out


# --- mistakes ---


def status_of(arguments: list[str]) -> int | str | None:
    try:
        return cli.main(["train", *arguments])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gama", "0.5"], "--gama 0.5. There is no option --gama. Did you mean '--gamma'?"),
        (["--method", "aimpk"], "`method` is 'aimpk'; choose one of dynamic_cot, aimkp, "),
        (["--strategy", "dynamik"], "`strategy` is 'dynamik'; choose one of 'dynamic'"),
        (["--strategy", "dynamik"], "Did you mean 'dynamic'?"),
        (["--gamma", "quantile:2"], "quantile:2"),
        (["--task", "aimpk", "--train_file", "POSTS"], "Did you mean 'aimkp'?"),
        (["--method", "mulcot_rd", "--task", "mascc"], "Did you mean 'masc'?"),
        (["--modality", "txt"], "`modality` is 'txt'; choose 'both', 'text' or 'image'. Did you mean 'text'?"),
        (["--eval_modalities", "both", "picture"], "`eval_modalities` is 'picture'"),
        (["--max_new_tokens", "0"], "`max_new_tokens` is 0; give 1 or more."),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--optim", "adamw_torhc"], "Did you mean 'adamw_torch'?"),
        (["--recipe", "mmkp_dynamic_cot_qwen2_5_vl_3"], "Did you mean 'mmkp_dynamic_cot_qwen2_5_vl_3b'?"),
        (["--recipe", "a", "--config", "b"], "--recipe a and --config b: give one of them"),
        (["--config", "cmkp_aimkp_qwen2_vl_7b.yaml"], "there is no such file. `--recipe cmkp_aimkp_qwen2_vl_7b` is installed."),
        (["--config", "CONFIG"], "has `gama`, which is no option of method 'dynamic_cot'. Did you mean 'gamma'?"),
        (["--config", "TORN"], "is not YAML"),
        (["--config", "LIST"], "must be a mapping of options to values"),
        (["--train_file", "pots.jsonl"], "='pots.jsonl': there is no such file or folder. Did you mean 'posts.jsonl'?"),
        (["--image_dir", "imges", "--train_file", "POSTS"], "--image_dir='imges': there is no such folder. Did you mean"),
        (["--method", "aimkp"], "posts are drawn for dynamic_cot only: give a `train_file`."),
        # An abbreviation would be read with the defaults of another run: those of a model from scratch, or of drawn posts.
        (["--model_name", "m", "--train_file", "POSTS"], "no option --model_name. Did you mean '--model_name_or_path'?"),
        (["--train_fil", "POSTS"], "There is no option --train_fil. Did you mean '--train_file'?"),
        (["--recip", "mmkp_dynamic_cot_qwen2_5_vl_3b"], "There is no option --recip. Did you mean '--recipe'?"),
        (["--meth", "aimkp"], "There is no option --meth. Did you mean '--method'?"),
        # Drawn posts are for a model from scratch: what names a model or data would have no effect.
        (["--eval_file", "POSTS"], "--train_file is missing, but --eval_file is given"),
        (["--eval_file", "POSTS", "--image_dir", "images"], "--train_file is missing, but --eval_file, --image_dir are given"),
        (["--model_name_or_path", "images"], "--model_name_or_path"),
        (["--method", "mulcot_rd", "--train_file", "POSTS", "--assistant", "./nowhere"], "--assistant='./nowhere': "),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    write_jsonl(tmp_path / "posts.jsonl", POSTS)
    (tmp_path / "config.yaml").write_text("gama: 0.5\nstrategy: dynamic\n")
    (tmp_path / "torn.yaml").write_text("gamma: [0.5\n")
    (tmp_path / "list.yaml").write_text("- gamma\n")
    files = {"POSTS": "posts.jsonl", "CONFIG": "config.yaml", "TORN": "torn.yaml", "LIST": "list.yaml"}
    arguments = [files.get(word, word) for word in arguments]
    assert status_of([*arguments, "--use_cpu", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("dynkp train: error: ")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("runs/studnet", "--model_name_or_path='runs/studnet': there is no such folder. Did you mean 'runs/student'?"),
        ("./student", "--model_name_or_path='./student': there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("runs", "--model_name_or_path='runs' has neither a config.json nor an adapter_config.json"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "there is no such folder, and the Hub cannot be reached; name a folder, or download"),
    ],
)
def test_a_mistyped_model_is_found_first(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the posts, which are not there either, and before bf16, which is on by default and needs a GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/student").mkdir(parents=True)
    assert status_of(["--model_name_or_path", model, "--train_file", "nowhere.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "bf16" not in error and "nowhere.jsonl" not in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--strategy", "dynamik", "--debug"], ["--debug", "train", "--strategy", "dynamik"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback") and "in drop_rate" in error
        assert error.rstrip().rsplit("\n", 1)[1].startswith("dynkp train: error: `strategy` is 'dynamik'")
    # With a value, it is transformers' option of that name.
    options = train.read_options(["--debug", "underflow_overflow", "--use_cpu", "true"])
    assert options is not None and [option.value for option in options.args.debug] == ["underflow_overflow"]


def test_too_little_memory_says_what_to_lower(posts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("dynkp.training.run.train", full)
    with pytest.raises(RunFailedError):
        train.main([*posts, *QUICK])
    assert cli.main(["train", *posts, *QUICK]) == 1
    error = capsys.readouterr().err
    assert "Lower --per_device_train_batch_size" in error and error.count("\n") == 1


# --- Ctrl-C ---


def interrupt(process: subprocess.Popen[str], file: Path) -> str:
    deadline = time.monotonic() + 200
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never came that far"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    return error


def test_ctrl_c_names_the_command_that_continues(posts: list[str], tmp_path: Path) -> None:
    arguments = [*posts, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "400", "--save_strategy", "steps"]
    arguments += ["--save_steps", "2", "--save_total_limit", "2"]
    process = start("-m", "dynkp", "train", *arguments, folder=tmp_path)
    error = interrupt(process, tmp_path / "out/checkpoint-4/trainer_state.json")
    last = error.rstrip().rsplit("\n", 1)[1]
    match = re.fullmatch(r"dynkp train: interrupted; (.*)/checkpoint-(\d+) is saved; continue with `dynkp train (.*)`", last)
    assert match and match[1] == str(tmp_path / "out") and "Traceback" not in error
    words = shlex.split(match[3])
    assert words == [*arguments, "--resume_from_checkpoint", "last"]
    steps = str(int(match[2]) + 4)
    words[words.index("400")] = steps
    assert cli.main(["train", *words]) == 0
    log = json.loads((tmp_path / "out/metrics.json").read_text())["log"]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, int(steps) + 1))


def test_ctrl_c_before_the_first_checkpoint(posts: list[str], tmp_path: Path) -> None:
    arguments = [*posts, *QUICK, *TINY, "--strategy", "direct", "--max_steps", "4000", "--save_strategy", "no"]
    arguments += ["--log_choices", "true", "--strategy", "dynamic"]
    error = interrupt(start("-m", "dynkp", "train", *arguments, folder=tmp_path), tmp_path / "out/choices.jsonl")
    last = error.rstrip().rsplit("\n", 1)[1]
    assert last.startswith(f"dynkp train: interrupted; there is no checkpoint in {tmp_path / 'out'} yet, so the same command")


def test_the_command_that_continues_drops_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/trainer_state.json").write_text("{}")
    told = ["--resume_from_checkpoint", "true", "--output_dir", "a b", "--resume-from-checkpoint=x"]
    expected = f"{tmp_path}/checkpoint-3 is saved; continue with `dynkp train --output_dir 'a b' --resume_from_checkpoint last`"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dynkp"])
    assert train.how_to_continue(told, str(tmp_path)) == expected
    monkeypatch.setattr(sys, "argv", ["examples/train.py"])
    assert "`python examples/train.py --output_dir" in train.how_to_continue(told, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the same launcher and `-m dynkp train --output_dir" in train.how_to_continue(told, str(tmp_path))


# --- what it leaves ---


def test_an_empty_result_says_what_to_look_at(posts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that is taught to reason and has no room to come to an answer."""
    rows = [{**post, "rationale": "People look for it " * 4} for post in POSTS]
    write_jsonl(tmp_path / "posts.jsonl", rows)
    options = [
        "--strategy",
        "cot",
        "--max_steps",
        "60",
        "--learning_rate",
        "0.01",
        "--weight_decay",
        "0",
        "--warmup_steps",
        "5",
    ]
    train.main([*posts, *QUICK, *TINY, *options, "--max_new_tokens", "6", "--save_strategy", "no"])
    assert all(not row["keyphrases"] for row in read_jsonl(tmp_path / "out/predictions.jsonl"))
    text = " ".join(caplog.text.split())
    assert "No output holds a keyphrase: 8 of 8 were cut off at 6 tokens, so raise --max-new-tokens." in text
    assert f"The outputs are in {tmp_path / 'out'}/predictions.jsonl" in text


def test_the_convention_is_the_same_during_and_after_the_training(
    posts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--strategy", "direct", "--max_steps", "40", "--learning_rate", "0.01", "--eval_convention", "padded"]
    options += ["--eval_strategy", "steps", "--eval_steps", "40", "--eval_max_new_tokens", "24"]
    train.main([*posts, *QUICK, *TINY, *options, "--save_strategy", "no"])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    system = metrics["systems"]["direct"]
    assert system["convention"] == "padded" and "convention padded" in capsys.readouterr().out
    logged = next(row for row in metrics["log"] if "eval_f1@1" in row)
    assert logged["eval_f1@1"] == pytest.approx(system["subsets"]["all"]["f1@1"])
    assert "f1@m" in system["subsets"]["all"], "a measure that only the field's conventions have"


def test_every_method_has_its_parser() -> None:
    for method in METHODS:
        assert train.TrainParser(method).config_class is METHODS[method][1]
    assert os.path.isfile(REPOSITORY / "examples/train.py")
    assert len((REPOSITORY / "examples/train.py").read_text().splitlines()) <= 40
