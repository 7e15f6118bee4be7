"""Invariants of the metric as users load it:

- `evaluate.load` loads it from the checkout and from a copy of the folder anywhere (as a Space is), without a network, and
  `dynkp.load_metric` from the installed package; all give the same figures;
- batches and a single call give the same scores; an error leaves the batches added before unchanged;
- the examples of the metric card, and of every docstring in the folder, are true.
"""

from __future__ import annotations

import doctest
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import yaml

import dynkp
from dynkp.mmkp_f1.evaluation import evaluate_keyphrases
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "dynkp" / "mmkp_f1"
POSTS = {
    "predictions": [["dogs", "cats", "dog"], ["sun"], []],
    "references": [["dog"], ["rain", "sun"], ["sea"]],
    "texts": ["my dog", "a cloud", ""],
}
TRAIN = ["sun", "dog"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


@pytest.fixture
def metric():
    return dynkp.load_metric()


def test_installed_checkout_and_space_agree(metric, tmp_path, monkeypatch):
    expected = evaluate_keyphrases(**POSTS, train_keyphrases=TRAIN, ks=[1, 2])
    assert metric.compute(**POSTS, train_keyphrases=TRAIN, k=[1, 2]) == expected
    monkeypatch.chdir(REPOSITORY)
    loaded = evaluate.load("dynkp/mmkp_f1")
    assert type(loaded).__module__ != type(metric).__module__  # its own copy, not the package
    assert loaded.compute(**POSTS, train_keyphrases=TRAIN, k=[1, 2]) == expected


def test_a_space_needs_nothing_but_the_folder(tmp_path):
    space = tmp_path / "mmkp_f1"
    shutil.copytree(FOLDER, space, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys
sys.modules["dynkp"] = None  # not installed
import evaluate
metric = evaluate.load({str(space)!r})
print(metric.compute(predictions=["<think>x</think><answer>dogs</answer>"], references=[["dog"]], parse=True, confidence=0.9,
                     resamples=10)["subsets"]["all"]["f1@1"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "1.0", done.stderr


def test_every_file_of_the_folder_is_imported_by_the_module():
    text = (FOLDER / "mmkp_f1.py").read_text()
    for file in FOLDER.glob("*.py"):
        if file.stem not in ("__init__", "mmkp_f1"):
            assert f"\nfrom .{file.stem} import " in text, f"evaluate.load would not copy {file.name}"


def test_batches_are_one_call(metric):
    for row in zip(*POSTS.values(), strict=True):
        metric.add_batch(**{name: [value] for name, value in zip(POSTS, row, strict=True)})
    assert metric.compute(train_keyphrases=TRAIN) == evaluate_keyphrases(**POSTS, train_keyphrases=TRAIN)
    for prediction, reference, text in zip(*POSTS.values(), strict=True):
        metric.add(prediction=prediction, reference=reference, text=text)
    assert metric.compute(convention="padded", subsets=["absent"]) == evaluate_keyphrases(
        **POSTS, convention="padded", subsets=["absent"]
    )
    metric.add_batch(predictions=[["a"]], references=[["a"]])  # without texts, after posts that had them
    assert list(metric.compute()["subsets"]) == ["all"]


def test_two_processes_score_all_posts_on_the_first(tmp_path):
    code = """
import json, sys
import dynkp
rank = int(sys.argv[1])
metric = dynkp.load_metric(num_process=2, process_id=rank, experiment_id="two", cache_dir=sys.argv[2])
posts = [
    {"predictions": [["x"], ["sun"]], "references": [["a"], ["sun"]]},
    {"predictions": [["dog"]], "references": [["dogs"]]},
]
metric.add_batch(**posts[rank], texts=["a dog"] * len(posts[rank]["references"]))
print(json.dumps(metric.compute(k=[1])))
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in ranks)
    assert second is None
    assert first == evaluate_keyphrases([["x"], ["sun"], ["dog"]], [["a"], ["sun"], ["dogs"]], texts=["a dog"] * 3, ks=[1])


def test_raw_outputs(metric):
    outputs = ["<think>A dog.</think><answer>#dogs; cat</answer>", "sun, sea", "<think>cut off"]
    gold = [["dog"], ["sea"], ["x"]]
    result = metric.compute(predictions=outputs, references=gold, parse=True, separator=",", count_tokens=len, k=[2])
    assert result["subsets"]["all"]["r@2"] == 1 / 3  # "dogs; cat" is one phrase with this separator
    assert result["unparsable_share"] == 1 / 3
    assert result["reasoning_share"] == 2 / 3
    assert result["output_tokens"] == sum(map(len, outputs)) / 3


def test_columns_arrays_and_generators_are_lists(metric):
    rows = datasets.Dataset.from_dict({"raw": ["dogs; cat", "sun"], "gold": [["dog"], ["sea"]]})
    for outputs in (rows["raw"], np.array(rows["raw"][:]), iter(rows["raw"][:])):
        assert metric.compute(predictions=outputs, references=rows["gold"], parse=True)["subsets"]["all"]["r@1"] == 0.5
    assert metric.compute(predictions=rows["gold"], references=rows["gold"])["subsets"]["all"]["r@1"] == 1


def test_intervals(metric):
    predictions, references = [["a"]] * 60 + [["b"]] * 40, [["a"]] * 100
    result = metric.compute(predictions=predictions, references=references, k=[1], confidence=0.9, train_keyphrases=["a"])
    low, high = result["intervals"]["subsets"]["all"]["f1@1"]
    assert 0.45 < low < 0.55 and 0.65 < high < 0.75
    assert result["intervals"]["subsets"]["unseen"]["f1@1"] is None
    assert (result["intervals"]["confidence"], result["intervals"]["resamples"]) == (0.9, 10_000)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"predictions": [[float("nan")]]}, TypeError, r"predictions\[0\]\[0\] must be a string, got float"),
        ({"predictions": [float("nan")]}, TypeError, r"predictions\[0\] must be a list of strings, got float"),
        ({"predictions": ["a; b"]}, TypeError, r"predictions\[0\]='a; b' is a string: .* parse=True"),
        ({"predictions": [["a"]], "parse": True}, TypeError, r"predictions\[0\] must be a string"),
        ({"predictions": None}, TypeError, "predictions must be a list"),
        ({"predictions": [["a"], ["b"]]}, ValueError, "predictions has 2 posts and references has 1"),
        ({"references": [[]]}, ValueError, r"references\[0\]=\[\]"),
        ({"references": None}, TypeError, "references must be a list"),
        ({"texts": ["a", "b"]}, ValueError, "texts has 2 posts"),
        ({"subsets": ["present"]}, ValueError, "the subset 'present' needs texts"),
        ({"subsets": ["all", "present&unseen"]}, ValueError, "needs train_keyphrases"),
        ({"subsets": ["rare"]}, ValueError, "subsets: 'rare' is not known"),
        ({"convention": "f1"}, ValueError, "convention='f1' is not known"),
        ({"k": [0]}, ValueError, r"ks=\[0\]"),
        ({"confidence": 95}, ValueError, "confidence=95 must be between 0 and 1"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_what_is_refused_costs_nothing_added_before(metric, more, error, message):
    metric.add_batch(predictions=[["a"]], references=[["a"]])
    with pytest.raises(error, match=message):
        metric.compute(**{"predictions": [["x"]], "references": [["a"]], **more})
    with pytest.raises(TypeError, match="raw outputs in some batches"):
        metric.add_batch(predictions=["a"], references=[["a"]])
    with pytest.raises(ValueError, match="texts were given with some batches"):
        metric.add_batch(predictions=[["a"]], references=[["a"]], texts=["a"])
    result = metric.compute()
    assert (result["posts"], result["subsets"]["all"]["f1@1"]) == (1, 1.0)


def test_no_posts(metric):
    result = metric.compute(predictions=[], references=[], confidence=0.9, k=[1])
    assert result["subsets"]["all"]["f1@1"] is None
    assert result["intervals"]["subsets"]["all"]["f1@1"] is None


def test_the_card():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["title"] == "mmkp_f1" and {"evaluate", "metric"} <= set(head["tags"])
    for heading in ("Metric description", "How to use", "Inputs", "Output values", "Limitations and bias", "Citation"):
        assert f"# {heading}\n" in text


def test_the_card_s_examples(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    code = "\n".join(
        block.split("```")[0] for block in (FOLDER / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    )
    examples = doctest.DocTestParser().get_doctest(code, {}, "README.md", "README.md", 0)
    assert len(examples.examples) >= 8
    assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__"))
def test_docstrings_examples(name):
    assert doctest.testmod(importlib.import_module(f"dynkp.mmkp_f1.{name}")).failed == 0


def test_the_module_says_what_it_is(metric):
    assert "convention" in metric.inputs_description and "wang-etal-2020" in metric.citation
    code = metric.inputs_description.split("Examples:\n")[1]
    examples = doctest.DocTestParser().get_doctest(code, {"evaluate": evaluate_of(metric)}, "inputs", None, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0


def evaluate_of(metric):
    """`evaluate` with a `load` that needs no particular working directory."""
    return type("Evaluate", (), {"load": staticmethod(lambda path: metric)})


def test_folder_is_what_the_wheel_ships():
    assert "mmkp_f1/README.md" in (REPOSITORY / "setup.cfg").read_text()
    assert {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")} == {"README.md"}
    assert Path(dynkp.__file__).parent == FOLDER.parent
