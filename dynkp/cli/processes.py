"""The process that a command runs in, among those that `accelerate launch` or torchrun started, if any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OneProcess:
    """What `accelerate.PartialState` tells of several processes, for a process without others.

    Args:
        device: the device to compute on.
    """

    device: Any
    process_index = 0
    num_processes = 1
    is_main_process = True

    def wait_for_everyone(self) -> None:
        """Return at once."""

    def destroy_process_group(self) -> None:
        """Do nothing."""


def this_process(device: str) -> Any:
    """Join the group of processes that a launcher started.

    Args:
        device: `"auto"`, or a device's name; of several processes each has its own.

    Returns:
        An `accelerate.PartialState`, or a `OneProcess`.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if device not in ("auto", "cpu") and found.type != device.partition(":")[0]:
            raise ValueError(f"--device {device}: torch finds none here; take auto or cpu")
        return OneProcess(found if device == "auto" else torch.device(device))
    from datetime import timedelta

    from accelerate import PartialState

    # A process that is done waits for the others, for as long as it takes.
    return PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
