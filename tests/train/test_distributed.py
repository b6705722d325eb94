"""Distributed training: results do not depend on the number of ranks, and a kill loses no result."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.distillation import CHECKPOINT
from train.distributed import ALONE, STORE, is_first_rank, started_by_torchrun

HERE = Path(__file__).resolve().parent
PROCESS = HERE / "distill_process.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def started(
    count: int, command: list[str], *, interface: str | None = "lo", **settings: str
) -> list[subprocess.Popen]:
    """The processes of a job, with the environment that torchrun would set."""
    port = str(free_port())
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}",
            "OMP_NUM_THREADS": "1",
            **({} if interface is None else {"GLOO_SOCKET_IFNAME": interface}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            **settings,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def trained(result: Path, count: int, folder: Path | None = None, **settings: str) -> list:
    """The final weights of each rank of a finished job."""
    command = [str(PROCESS), str(result), "-" if folder is None else str(folder)]
    processes = started(count, command, **settings)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    return [load_file(result.with_name(f"{result.name}.{rank}")) for rank in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of one uninterrupted process."""
    return trained(tmp_path_factory.mktemp("alone") / "weights", 1)[0]


@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_train_the_student_of_one(tmp_path, alone, count):
    """Three ranks draw shards of eight windows that differ in size."""
    first, *others = trained(tmp_path / "weights", count)
    assert all(same(first, other) for other in others)
    for name, value in alone.items():  # sums in another order, over 40 steps
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=2e-4)


def begun(folder: Path, count: int) -> list[subprocess.Popen]:
    """A slow job that has written its first checkpoint."""
    command = [str(PROCESS), str(folder / "never"), str(folder)]
    processes = started(count, command, PAUSE_S="0.3")
    for _ in range(3000):
        if (folder / CHECKPOINT).exists() or processes[0].poll() is not None:
            break
        time.sleep(0.01)
    return processes


def test_a_killed_training_resumes_to_the_same_result(tmp_path, alone):
    (process,) = begun(tmp_path, 1)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert same(trained(tmp_path / "weights", 1, tmp_path)[0], alone)


def test_other_ranks_notice_a_kill_and_any_number_of_ranks_resumes(tmp_path, alone):
    processes = begun(tmp_path, 2)
    processes[1].kill()
    output = processes[0].communicate(timeout=60)[0]
    processes[1].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "RanksError: a distributed worker exited or timed out" in output
    found = trained(tmp_path / "weights", 1, tmp_path)[0]
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


FAILING = """
import time
from lightfield.errors import SceneError
from train.distributed import AnotherRankFailedError, joined_ranks
try:
    with joined_ranks() as ranks:
        print(ranks.broadcast_text("a word: \u00fc" if ranks.is_first else ""))
        print(ranks.broadcast_text("") == "")
        ranks.barrier()
        raise SceneError("broken")
except AnotherRankFailedError:
    print("quiet")
except SceneError as error:
    print(error)
time.sleep(1)  # torchrun keeps the store; here the store ends with rank 0
"""


def test_rank_0_broadcasts_texts_and_only_the_first_error_is_reported():
    outputs = [p.communicate(timeout=60)[0].splitlines() for p in started(2, ["-c", FAILING])]
    assert [lines[:2] for lines in outputs] == [["a word: ü", "True"]] * 2
    assert sorted(lines[2:] for lines in outputs) == [["broken"], ["quiet"]]


LISTENING = """
import os, sys
from pathlib import Path
from lightfield.errors import SceneError
from train.distributed import AnotherRankFailedError, joined_ranks
def listening():
    names = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n > "2"
             and os.path.lexists(f"/proc/self/fd/{n}")]
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in names:
                yield words[1].split(":")[0]
try:
    with joined_ranks() as ranks:
        ranks.barrier()
        print(*listening())
        sys.stdout.flush()
        ranks.barrier()
        if ranks.is_first:
            raise SceneError("broken")
        ranks.barrier()
except SceneError:
    os._exit(2)  # without cleaning up
except AnotherRankFailedError:
    print("quiet")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_on_one_machine_no_port_is_open_and_only_the_error_of_rank_0_is_reported(
    tmp_path,
):
    local = {STORE: str(tmp_path / "store"), "LOCAL_WORLD_SIZE": "2"}
    first, second = started(2, ["-c", LISTENING], interface=None, **local)
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in (first, second)]
    assert [set(lines[0].split()) for lines in outputs] == [{"0100007F"}] * 2, outputs
    assert [lines[1:] for lines in outputs] == [[], ["quiet"]]


def test_a_single_process_joins_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first_rank()
    assert not started_by_torchrun()
    value = torch.ones(3)
    ALONE.average_(value)
    ALONE.broadcast_([value])
    ALONE.barrier()
    assert torch.equal(value, torch.ones(3))
    assert ALONE.broadcast_text("word") == "word"
