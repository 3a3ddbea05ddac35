"""The one error type that a user is meant to see."""


class WSSSError(Exception):
    """Bad input, in one line: names the file or key, what was expected and what to do.

    The command line prints the message without a traceback (``WSSS_DEBUG=1`` shows it) and exits
    with status 2. It takes a single string, so that it survives being re-raised from a worker.
    """
