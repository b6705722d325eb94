"""Entry point of the `nelf` command: a user-facing error is one line on stderr, with exit code 2.

Ctrl-C is such an error, at any moment. While the imports run, which takes seconds, the handler ends
the process at once, because libraries swallow a KeyboardInterrupt during their import.

When torchrun started several ranks, the rank that fails first prints its error. torchrun then ends
the other ranks with SIGTERM, whose default action they take: they may be blocked in a library that
does not return to Python.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from lightfield.names import in_a_line
from pipeline.memory import keep_freed_memory

INTERRUPTED = "interrupted; finished stages are kept, repeat the command to go on"
SIGPIPE_EXIT_CODE = 128 + signal.SIGPIPE
"""Exit status after SIGPIPE, for example when the output is piped into `head`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    if arguments is None:  # started as the `nelf` program, not called by a test
        keep_freed_memory()
        for stream in (sys.stdout, sys.stderr):  # escape characters that the terminal cannot show
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    with _exiting_on_interrupt():
        from pipeline.commands.command_line import perform
        from pipeline.errors import error_line
        from train.distributed import AnotherRankFailedError, is_first_rank, started_by_torchrun
    several_ranks = started_by_torchrun()
    try:
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL if several_ranks else signal.default_int_handler
        )
        perform([word for word in words if word != "--debug"])
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
        code = _print_error(INTERRUPTED) if is_first_rank() else 2
        # Without this, Python exits with the signal's status if Ctrl-C came during an `exec`.
        if several_ranks or arguments is None:
            _exit_now()
        return code
    except AnotherRankFailedError:
        _exit_now()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _exit_now(SIGPIPE_EXIT_CODE)
        text = error_line(error)
        if debug or text is None:
            raise
        code = _print_error(text)
        if several_ranks:
            _exit_now()
        return code
    if several_ranks:
        _exit_now(0)
    return 0


@contextlib.contextmanager
def _exiting_on_interrupt() -> Iterator[None]:
    def exit_now(number: int, frame: FrameType | None) -> None:
        os.write(2, f"nelf: {INTERRUPTED}\n".encode())
        os._exit(2)

    before = signal.signal(signal.SIGINT, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_now(code: int = 2) -> NoReturn:
    """Exit without cleanup by libraries: a process group that waits for the other ranks may wait
    forever, and library threads that still run abort the process."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _output_is_closed() -> bool:
    """Whether stdout or stderr is the broken pipe; it may also be the connection to a phone."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in outputs.poll(0))


def _print_error(text: str) -> int:
    print(f"nelf: {in_a_line(text)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
