"""From an exception to one line on standard error and an exit status."""

import contextlib
import os
import sys
from collections.abc import Callable

from wsss.core.errors import WSSSError

#: in the environment of a sweep's job: its files without their suffix
JOB_STEM = "WSSS_JOB"


def exit_status_of(name: str, run: Callable[[], int]) -> int:
    """Run something; an error becomes one line on standard error and an exit status."""
    try:
        return run()
    except KeyboardInterrupt:
        print("wsss: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("WSSS_DEBUG") == "1":
            raise
        if isinstance(error, WSSSError):
            report_error(name, str(error))
            return 2
        text = (str(error).splitlines() or [""])[0]
        report_error(name, f"{type(error).__name__}: {text} (WSSS_DEBUG=1 shows the traceback)")
        return 1


def report_error(name: str, text: str) -> None:
    """Print one line on standard error; write it for the sweep that this process is a job of."""
    print(f"wsss {name}: {text}", file=sys.stderr)
    if stem := os.environ.get(JOB_STEM):
        with contextlib.suppress(OSError), open(f"{stem}.error", "w") as file:
            file.write(text)
