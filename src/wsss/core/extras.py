"""Packages that only an extra of this one installs."""

from typing import Any

from wsss.core.errors import WSSSError


def import_optuna(need: str) -> Any:
    """Give Optuna, silent but for errors.

    Args:
        need: what needs it, as the error begins.

    Raises:
        WSSSError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise WSSSError(f"{need}: pip install 'wsss[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
