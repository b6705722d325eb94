"""The `nelf` command's way in and out: what goes wrong is one line on stderr, and exit code 2.

That holds from the first moment: importing torch takes seconds, and half-imported libraries do not
pass an interruption on, so until all is imported one ends the process at once.

Of several processes that torchrun started, the one that fails first says why; torchrun ends the others,
which may be waiting in a library that hears no interruption, and so die of its signal in silence.
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

from lightfield.memory import keep_freed_memory
from lightfield.names import in_a_line

INTERRUPTED = "interrupted; finished stages are kept, the same command goes on from here"
UNREAD_EXIT_CODE = 141
"""Of a command whose output nobody reads any more, as after `| head`: 128 and the number of SIGPIPE."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    if arguments is None:  # the process is ours
        keep_freed_memory()
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no error
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    with _ending_when_interrupted():
        from pipeline.commands.command_line import perform
        from pipeline.mishaps import in_one_line
        from train.distributed import AnotherRankFailedError, is_first_rank, started_by_torchrun
    many = started_by_torchrun()
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if many else signal.default_int_handler)
        perform([word for word in words if word != "--debug"])
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would garble the way out
        code = _refuse(INTERRUPTED) if is_first_rank() else 2
        # Python would die of the signal after all, had it come while a library ran code from a string.
        if many or arguments is None:
            _leave()
        return code
    except AnotherRankFailedError:
        _leave()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            _leave(UNREAD_EXIT_CODE)
        text = in_one_line(error)
        if debug or text is None:
            raise
        code = _refuse(text)
        if many:
            _leave()
        return code
    if many:
        _leave(0)
    return 0


@contextlib.contextmanager
def _ending_when_interrupted() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"nelf: {INTERRUPTED}\n".encode())
        os._exit(2)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(code: int = 2) -> NoReturn:
    """End at once: libraries that wait for the other processes, to say goodbye, may wait for ever, or
    end with threads of theirs still running, which aborts."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _is_unread() -> bool:
    """Whether it was our own output that broke, and not a phone's connection, say."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in outputs.poll(0))


def _refuse(text: str) -> int:
    print(f"nelf: {in_a_line(text)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
