"""Where configurations lie. Nothing heavy is imported, so that ``--help`` can list choices."""

from pathlib import Path

from wsss.core.errors import WSSSError

PACKAGE = Path(__file__).parents[1]


def config_root() -> Path:
    """Find the folder that holds ``conf/`` and ``experiments/``.

    Inside an installed wheel that is the package itself; in a checkout the project's root.

    Raises:
        WSSSError: neither is there, so the installation is broken.
    """
    for root in (PACKAGE, PACKAGE.parents[1]):
        if (root / "conf" / "train.yaml").is_file():
            return root
    raise WSSSError(f"no conf/train.yaml beside {PACKAGE}: the installation is incomplete")


def choices(group: str) -> list[str]:
    """Give the names of the files of a group of ``conf/``, such as ``method``."""
    return sorted(path.stem for path in (config_root() / "conf" / group).glob("*.yaml"))
