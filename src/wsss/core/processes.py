"""Processes that belong together: who ends with whom, and who listens to Ctrl-C."""

import os
import signal
import socket
import threading
import time


def end_with(parent: int, number: signal.Signals) -> None:
    """Send this process a signal once its parent is gone, also after ``kill -9`` of the parent.

    Args:
        parent: process id of the parent.
        number: what to send: SIGTERM where there is something to save, else SIGKILL.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def serve(parent: int) -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent, signal.SIGKILL)


def ignore_terminal_signals() -> None:
    """Let Ctrl-C and SIGTERM pass by unless the parent sends it: for workers that load data.

    A terminal sends Ctrl-C, and SLURM SIGTERM, to all processes of a job. If the workers ended
    then, the step in progress, which the parent wants to end well, would fail for want of data.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="end with the parent").start()


def is_alive(process: str) -> bool:
    """Say whether ``HOST PID`` is, as far as can be seen from here, a process that runs."""
    host, _, pid = process.partition(" ")
    if host != socket.gethostname() or not pid.isdigit():
        return bool(host)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
