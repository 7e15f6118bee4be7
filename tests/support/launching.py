"""Starting several ranks as users do, with an end to every wait."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RANK_SCRIPTS = REPOSITORY / "tests" / "distributed"
TIMEOUT = 240  # seconds; a rank that waits for ever is a failure, not a hanging build


@functools.cache
def build_deepspeed_operations() -> None:
    """Compile what DeepSpeed needs on a CPU: up to two minutes the first time on a machine, then it is in torch's cache."""
    builder = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('ShareMemCommBuilder').load()"
    finish([start([sys.executable, "-c", builder])])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(config: str | Path, *command: Any, machines: int = 1, folder: Path = REPOSITORY) -> str:
    """Run a script on two ranks, of one machine or of two on this one. Returns what they printed, once both succeeded.

    Args:
        config: an Accelerate configuration, by its name in examples/accelerate or its path.
        command: the script and its arguments, or `-m`, a module and its arguments.
        machines: 2 for two launchers.
        folder: where to start; the configurations in examples/ name each other from the repository's root.
    """
    config = REPOSITORY / "examples" / "accelerate" / config
    if "zero" in config.name:
        build_deepspeed_operations()
    options = ["--config_file", config, "--num_processes", 2, "--main_process_port", free_port()]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    if machines == 1:
        return finish([start([*launcher, *command], folder)])
    ranks = [["--num_machines", machines, "--machine_rank", rank] for rank in range(machines)]
    return finish([start([*launcher, *rank, *command], folder) for rank in ranks])


def start(command: Sequence[Any], folder: Path = REPOSITORY) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a launcher's ranks can be ended with it
    )


def finish(processes: Sequence[subprocess.Popen[str]]) -> str:
    """Wait for all; end all, if one fails or waits."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=TIMEOUT)[0])
            assert process.returncode == 0, outputs[-1][-6000:]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "\n".join(outputs)
