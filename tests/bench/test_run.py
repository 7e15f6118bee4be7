"""The command `dynkp bench`: wrong arguments are refused, and `all` is every suite but `gpu`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from dynkp.bench import measure, run
from dynkp.cli import bench as command


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--threads", "-1"], ["--suite", "speed"]])
def test_arguments_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_all_is_every_suite_but_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    pretend = ModuleType("pretend_suite")
    pretend.HEADINGS, pretend.cells = ("a",), lambda row: ("b",)

    def one_row(name: str) -> Any:
        ran.append(name)
        pretend.run = lambda setting: [{"device": "cpu", **measure.environment(setting)}]
        return pretend

    monkeypatch.setattr(run.importlib, "import_module", one_row)
    threads = torch.get_num_threads()
    command.main(["--quick", "--device", "cpu"])
    torch.set_num_threads(threads)
    assert ran == [module for name, (module, _) in run.SUITES.items() if name != "gpu"]
