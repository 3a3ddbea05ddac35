"""From an exception to one line on standard error and an exit status."""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable

from wsss.core.errors import WSSSError

#: in the environment of a sweep's job: its files without their suffix
JOB_STEM = "WSSS_JOB"
#: what the system says where a disk, a share of it or a file may not grow
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED_PIPE = 141  # what a shell gives a program whose reader has left
LONGEST = 1200  # characters of a line; the end says what to do, so the middle goes
HEAD = 800


def exit_status_of(name: str, run: Callable[[], int]) -> int:
    """Run something; an error becomes one line on standard error and an exit status.

    A reader of the output that has left, as ``head`` does, is no error.
    """
    try:
        status = run()
        sys.stdout.flush()  # here, where a reader that has left can still be noticed
        return status
    except KeyboardInterrupt:
        print("wsss: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("WSSS_DEBUG") == "1":
            raise
        if isinstance(error, BrokenPipeError) and _reader_left():
            return CLOSED_PIPE
        if isinstance(error, WSSSError):
            report_error(name, str(error))
            return 2
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = error.filename or "a file of this command"
            report_error(
                name, f"{where}: cannot be written ({error.strerror}); make room, then repeat it"
            )
            return 2
        text = (str(error).splitlines() or [""])[0]
        report_error(name, f"{type(error).__name__}: {text} (WSSS_DEBUG=1 shows the traceback)")
        return 1


def _reader_left() -> bool:
    """Say whether nobody reads the output any more; then what is left of it goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def report_error(name: str, text: str) -> None:
    """Print one line on standard error; write it for the sweep that this process is a job of."""
    line = one_line(text)
    print(f"wsss {name}: {line}", file=sys.stderr)
    if stem := os.environ.get(JOB_STEM):
        with contextlib.suppress(OSError), open(f"{stem}.error", "w") as file:
            file.write(line)


def one_line(text: str, longest: int = LONGEST) -> str:
    """Put a text on one line of bounded length, whatever a file or a user wrote into it.

    Characters that a terminal obeys are written out. Of a long text the middle goes.
    """
    if len(text) > longest:
        head = min(HEAD, longest * 2 // 3)
        tail = longest - head
        left_out = len(text) - head - tail
        text = f"{text[:head]} ... ({left_out:,} characters) ... {text[-tail:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
