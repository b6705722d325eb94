"""Several processes of one machine are started without an open network port."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from pipeline import processes
from train.distributed import STORE


def test_torchrun_uses_a_file_rendezvous_that_is_deleted_afterwards(monkeypatch):
    seen: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(processes, "torchrun", lambda words: seen.append((words, {**os.environ})))
    before = dict(os.environ)
    assert processes.main(["4", "student", "--run", "runs/lego"]) == 0
    assert dict(os.environ) == before  # later subprocesses do not belong to that job
    ((words, told),) = seen
    assert words[-6:] == ["-m", "--", "pipeline.cli", "student", "--run", "runs/lego"]
    assert {"--nproc-per-node=4", "--rdzv-conf=store_type=file"} <= set(words)
    assert told["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert not Path(told[STORE]).parent.exists()


@pytest.mark.parametrize(
    "words",
    [
        [], ["student"], ["2"], ["two", "student"], ["-1", "student"], ["0", "student"],
        ["9" * 5000, "student"],
    ],
)  # fmt: skip
def test_an_invalid_number_of_processes_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(processes, "torchrun", pytest.fail)
    assert processes.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nelf: usage: python -m pipeline.processes COUNT STAGE")


def failed(exit_code: int) -> ChildFailedError:
    return ChildFailedError("pipeline.cli", {0: ProcessFailure(0, 123, exit_code, "no error file")})


@pytest.mark.parametrize("error", [failed(2), SignalException("got signal: 2", signal.SIGINT)])
def test_an_error_that_a_process_has_printed_is_not_printed_again(error, monkeypatch):
    monkeypatch.setattr(processes, "torchrun", mock.Mock(side_effect=error))
    assert processes.main(["2", "student"]) == 2


def test_a_process_that_printed_no_error_is_an_error(monkeypatch):
    monkeypatch.setattr(processes, "torchrun", mock.Mock(side_effect=failed(-signal.SIGKILL)))
    with pytest.raises(ChildFailedError):
        processes.main(["2", "student"])
