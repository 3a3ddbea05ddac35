"""A comparison for notebooks: options as keyword arguments, numbers as a pandas DataFrame."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsss.comparison.compare import CompareArguments, Comparison
from wsss.comparison.compare import compare as compare_paths
from wsss.core.errors import WSSSError
from wsss.core.schema import check_node, parameters_of

if TYPE_CHECKING:
    import pandas


class Comparisons(list[Comparison]):
    """Comparisons, one a kind of supervision, which are never ranked against each other."""

    def frame(self) -> "pandas.DataFrame":
        """Give one row a run.

        Returns:
            Columns ``supervision``, ``group``, ``seed``, ``data``, ``split``, ``folder``, then one
            a metric: fractions, NaN where a run lacks the number.

        Raises:
            WSSSError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise WSSSError("a DataFrame needs the package pandas (pip install pandas)") from error
        metrics = list(dict.fromkeys(name for one in self for name in one.metrics))
        rows = [
            {
                "supervision": entry.card["supervision"],
                "group": entry.group,
                "seed": entry.results["seed"],
                "data": entry.results["data"],
                "split": entry.split,
                "folder": str(entry.folder),
                **{name: entry.metrics.get(name) for name in metrics},
            }
            for one in self
            for entry in one.entries
        ]
        return pandas.DataFrame(rows).astype(dict.fromkeys(metrics, float))


def compare(paths: Path | str | Sequence[Path | str], **options: Any) -> Comparisons:
    """Compare runs as ``wsss compare`` does.

    Args:
        paths: run folders, or folders that hold some.
        options: those of ``wsss compare`` but ``out``, such as ``by="study"``, ``split="val"``,
            ``allow=["iterations"]`` or ``unranked=True``.

    Returns:
        One comparison a kind of supervision; :meth:`Comparisons.frame` makes a DataFrame.

    Raises:
        WSSSError: unknown options; runs that cannot be read, grouped or ranked.
    """
    parameters = parameters_of(CompareArguments)
    del parameters["out"]
    check_node(options, parameters, "", supplied=set())
    listed = [paths] if isinstance(paths, Path | str) else paths
    return Comparisons(compare_paths([Path(path) for path in listed], CompareArguments(**options)))
