"""Where configurations lie: this project's, and those of packages that declare methods.

Nothing heavy is imported, so that ``--help`` can list choices.
"""

import importlib.util
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from wsss.core.errors import WSSSError

PACKAGE = Path(__file__).parents[1]
#: an installed package declares its methods here, as ``name = "package.module:Class"``
ENTRY_POINTS = "wsss.methods"


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


def declared_methods() -> tuple[EntryPoint, ...]:
    """Give what installed packages declare as their methods; none of it is imported."""
    return tuple(entry_points(group=ENTRY_POINTS))


def declared_folders() -> list[Path]:
    """Find the ``conf`` folders of the packages that declare methods."""
    folders: dict[Path, None] = {}
    for package in sorted({point.module.split(".")[0] for point in declared_methods()}):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if (folder := Path(place) / "conf").is_dir():
                folders[folder] = None
    return list(folders)


def choices(group: str) -> list[str]:
    """Give the names of the files of a group of ``conf/``, such as ``method``."""
    folders = (config_root() / "conf", *declared_folders())
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
