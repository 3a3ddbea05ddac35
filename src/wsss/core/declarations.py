"""Read what a constructor takes from its source, without importing it.

Importing a method imports torch, which takes seconds; a mistyped key should be refused at once.
:func:`declared` therefore parses the file that defines a class, and gives a dataclass with the same
fields: names, types with their ranges, defaults, and the line of meaning that stands beside each.
Everything that checks a real class (:mod:`wsss.core.schema`) checks this one alike. What cannot be
read is left to the check that imports the class: its type is ``Any`` here.
"""

import ast
import builtins
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

#: modules that are imported for the types that they define; those of Python itself are too
LIGHT = ("annotated_types", "pydantic", "typing_extensions", "wsss.core.ranges")
#: bases of classes that accept plain values, which only the class itself can check
ACCEPTING = {"Enum", "IntEnum", "StrEnum", "TypedDict", "NamedTuple", "Protocol", "BaseModel"}
#: words of a source that may define names without writing them out
DYNAMIC = {"__getattr__", "__dict__", "globals", "setattr", "exec", "vars", "modules"}
#: key of a field's metadata: its line of meaning
MEANING = "meaning"
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Example|Examples|Yields|Note):\s*$")


class UnreadDefault:
    """A default that only running the module would give; it prints as its source.

    Args:
        text: the source.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class NotReadError(Exception):
    """A source does not say what is looked for."""


def declared(name: str) -> type | None:
    """Give a dataclass with the fields that the constructor of a class takes.

    Args:
        name: dotted name of the class, which is not imported.

    Returns:
        The dataclass, whose fields have their meaning in ``metadata``; None where no source says
        what the class takes.
    """
    try:
        source, node = _find(name)
        return source.stand_in(node)
    except NotReadError:
        return None


def absent(name: str) -> str | None:
    """Say why there can be no class of a dotted name, as far as its package's sources tell.

    A module is only said to lack a name that its source does not have anywhere, and not where the
    source may define names that it does not write out.

    Args:
        name: of the class; nothing is imported.

    Returns:
        The reason; None where only an import can say.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    module = next((one for one in prefixes if _spec(one) is not None), None)
    if module is None:
        return f"no module {parts[0]}"
    try:
        source = _source(module)
    except NotReadError:
        return None
    (missing, *_) = [*name.removeprefix(module).split(".")[1:], ""]
    text = "\n".join(source.lines)
    words = set(re.findall(r"\w+", text))
    if not missing or missing in words or words & DYNAMIC or re.search(r"import\s+\*", text):
        return None
    near = difflib.get_close_matches(missing, source.names, n=1)
    return f"{module} has no {missing}" + (f"; did you mean {near[0]}?" if near else "")


def meanings(cls: type) -> dict[str, str]:
    """Give the line of meaning of every field of a class that :func:`declared` has read."""
    return {key: one.metadata.get(MEANING, "") for key, one in _fields(cls).items()}


def _fields(cls: type) -> Mapping[str, Any]:
    found: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return found


class Source:
    """A module's text and the names at its top, none of which has been run.

    Args:
        name: of the module.
        text: its source.
        is_package: it is the ``__init__`` of a folder.
    """

    def __init__(self, name: str, text: str, *, is_package: bool) -> None:
        self.name, self.lines = name, text.splitlines()
        self.package = name if is_package else name.rpartition(".")[0]
        self.names = dict(_names_of(ast.parse(text).body))
        self.stand_ins: dict[str, type] = {}

    def find(self, name: str) -> tuple["Source", ast.ClassDef]:
        """Find the class that a name stands for, here or where it is imported from."""
        statement = self.names.get(name)
        if isinstance(statement, ast.ClassDef):
            return self, statement
        if isinstance(statement, ast.ImportFrom):
            return _find(self._origin(statement, name))
        raise NotReadError(f"{self.name}.{name}")

    def _origin(self, statement: ast.ImportFrom, name: str) -> str:
        """Give the dotted name that ``from ... import ... as name`` stands for."""
        module = statement.module or ""
        if statement.level:
            above = self.package.split(".")[: len(self.package.split(".")) - statement.level + 1]
            module = ".".join([*above, module]).strip(".")
        (alias,) = [one for one in statement.names if (one.asname or one.name) == name]
        return f"{module}.{alias.name}"

    def value(self, name: str) -> Any:
        """Give what a name stands for in an annotation or a default."""
        statement = self.names.get(name)
        if isinstance(statement, ast.ClassDef):
            return self._type(statement)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            return self.evaluate(statement.value)
        if isinstance(statement, ast.Import):
            (alias,) = [o for o in statement.names if (o.asname or o.name.split(".")[0]) == name]
            if _is_light(alias.name):
                return importlib.import_module(alias.name if alias.asname else name)
        if isinstance(statement, ast.ImportFrom):
            module, _, inner = self._origin(statement, name).rpartition(".")
            if _is_light(module):
                return getattr(importlib.import_module(module), inner)
            return _source(module).value(inner)
        if statement is None and hasattr(builtins, name):
            return getattr(builtins, name)
        raise NotReadError(f"{self.name}.{name}")

    def evaluate(self, node: ast.expr) -> Any:
        """Evaluate an expression of types and constants."""
        code = compile(ast.fix_missing_locations(ast.Expression(node)), self.name, "eval")
        try:
            return eval(code, {}, _Names(self))
        except NotReadError:
            raise
        except Exception as error:  # whatever an expression raises where a part is not the real one
            raise NotReadError(self.name) from error

    def annotation(self, node: ast.expr | None) -> Any:
        """Give the type that an annotation names; Any where that would need an import."""
        if node is None:
            return Any
        try:
            return self.evaluate(_Unquoted().visit(node))
        except NotReadError:
            return Any

    def _type(self, node: ast.ClassDef) -> Any:
        """Give a dataclass for a dataclass, and for another class one that no plain value is of."""
        if _is_dataclass(node):
            return self.stand_in(node)
        if {_last_name(base) for base in node.bases} & ACCEPTING:
            raise NotReadError(f"{self.name}.{node.name}")
        return type(node.name, (), {})

    def stand_in(self, node: ast.ClassDef) -> type:
        """Make the dataclass that has what a class's constructor takes as its fields."""
        if node.name not in self.stand_ins:
            made = make_dataclass(
                node.name,
                [(key, *parts) for key, parts in self._arguments(node).items()],
                kw_only=True,
                frozen=True,
                namespace={"__doc__": ast.get_docstring(node), "__module__": self.name},
            )
            self.stand_ins[node.name] = made
        return self.stand_ins[node.name]

    def _arguments(self, node: ast.ClassDef) -> dict[str, tuple[Any, Any]]:
        """Give annotation and field of every argument of a class's constructor."""
        above = self._inherited(node)
        constructor = next(
            (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
        )
        said = documented(ast.get_docstring(node))
        if constructor is not None:
            said |= documented(ast.get_docstring(constructor))
            return self._of_signature(constructor, said)
        if not _is_dataclass(node):
            return above
        own: dict[str, tuple[Any, Any]] = {}
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if _last_name(statement.annotation) == "ClassVar":
                    continue
                name = statement.target.id
                meaning = self._comment(statement) or said.get(name, "")
                meaning = meaning or (above[name][1].metadata[MEANING] if name in above else "")
                own[name] = (
                    self.annotation(statement.annotation),
                    self._field(statement.value, meaning),
                )
        return above | own

    def _inherited(self, node: ast.ClassDef) -> dict[str, tuple[Any, Any]]:
        """Give what the constructors of the bases that can be read take, the first base's last."""
        found: dict[str, tuple[Any, Any]] = {}
        for base in reversed(node.bases):
            try:
                source, above = _find_from(self, base)
                found |= source._arguments(above)
            except NotReadError:
                continue
        return found

    def _of_signature(
        self, node: ast.FunctionDef, said: Mapping[str, str]
    ) -> dict[str, tuple[Any, Any]]:
        given = node.args
        if given.vararg or given.kwarg:
            raise NotReadError(f"{self.name}: {node.name} takes any argument")
        plain = [*given.posonlyargs, *given.args][1:]
        missing = [None] * (len(plain) - len(given.defaults))
        pairs = [
            *zip(plain, [*missing, *given.defaults][-len(plain) or None :], strict=True),
            *zip(given.kwonlyargs, given.kw_defaults, strict=True),
        ]
        return {
            one.arg: (self.annotation(one.annotation), self._field(default, said.get(one.arg, "")))
            for one, default in pairs
        }

    def _field(self, default: ast.expr | None, meaning: str) -> Any:
        """Make the field of an argument from its default and its line of meaning."""
        metadata = {MEANING: meaning}
        if isinstance(default, ast.Call) and _last_name(default.func) == "field":
            given = {one.arg: one.value for one in default.keywords}
            factory, default = given.get("default_factory"), given.get("default")
            if factory is not None:
                value = self._default(factory)
                made = value() if callable(value) else value
                return field(default_factory=lambda: made, metadata=metadata)
        if default is None:
            return field(metadata=metadata)
        value = self._default(default)
        if type(value).__hash__ is None:  # a list: dataclasses want it made anew
            return field(default_factory=lambda: value, metadata=metadata)
        return field(default=value, metadata=metadata)

    def _default(self, node: ast.expr) -> Any:
        try:
            return self.evaluate(node)
        except NotReadError:
            return UnreadDefault(ast.unparse(node))

    def _comment(self, statement: ast.stmt) -> str:
        """Give the comment behind a field, else the comment lines right above it."""
        last = (statement.end_lineno or statement.lineno) - 1
        behind = self.lines[last].encode()[statement.end_col_offset or 0 :].decode()
        if "#" in behind and "# type:" not in behind:
            return behind.partition("#")[2].strip()
        above: list[str] = []
        for line in reversed(self.lines[: statement.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("#: ").strip())
        return " ".join(above)


class _Names(dict[str, Any]):
    """The names of a module, looked up when an expression uses them."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def __missing__(self, name: str) -> Any:
        return self.source.value(name)


class _Unquoted(ast.NodeTransformer):
    """Turns ``"Name"`` in an annotation into the name, but not what ``Literal`` lists."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if _last_name(node.value) != "Literal":
            self.generic_visit(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str):
            return ast.parse(node.value, mode="eval").body
        return node


def documented(text: str | None) -> dict[str, str]:
    """Read the arguments that a docstring describes (Google style), each as one line."""
    found: dict[str, str] = {}
    inside, name, indent = False, "", -1
    for line in inspect.cleandoc(text or "").splitlines():
        if match := SECTION.match(line):
            inside, name, indent = match[1] in ("Args", "Attributes"), "", -1
            continue
        depth = len(line) - len(line.lstrip())
        if not inside or not line.strip():
            continue
        indent = depth if indent < 0 else indent
        entry = re.match(r"\s*(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if depth == indent and entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and depth > indent:
            found[name] = f"{found[name]} {line.strip()}".strip()
        else:
            inside = False
    return found


def _names_of(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Give the names that statements define, with the last one that does."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield statement.name, statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name, statement
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.asname or alias.name.split(".")[0], statement
        elif isinstance(statement, ast.If | ast.Try):  # TYPE_CHECKING, optional packages
            yield from _names_of([*statement.orelse, *statement.body])


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(
        _last_name(one.func if isinstance(one, ast.Call) else one) == "dataclass"
        for one in node.decorator_list
    )


def _last_name(node: ast.expr) -> str:
    """Give ``Name`` of ``Name``, ``package.Name`` and ``Name[...]``."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _is_light(module: str) -> bool:
    """Say whether importing a module takes no time."""
    return module.split(".")[0] in sys.stdlib_module_names or module in LIGHT


def _find(name: str) -> tuple[Source, ast.ClassDef]:
    """Find the class that a dotted name stands for."""
    module, _, title = name.rpartition(".")
    return _source(module).find(title)


def _find_from(source: Source, base: ast.expr) -> tuple[Source, ast.ClassDef]:
    if not isinstance(base, ast.Name):
        raise NotReadError(ast.unparse(base))
    return source.find(base.id)


def _source(module: str) -> Source:
    """Read a module's source.

    Raises:
        NotReadError: there is no such module, or it has no source.
    """
    spec = _spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise NotReadError(module)
    path = Path(spec.origin)
    stub = path.with_suffix(".pyi")  # of a package whose names are imported on first use
    path = stub if stub.is_file() else path
    is_package = spec.submodule_search_locations is not None
    return _parsed(module, path, path.stat().st_mtime_ns, is_package)


@functools.lru_cache(maxsize=256)
def _parsed(module: str, path: Path, changed: int, is_package: bool) -> Source:
    try:
        return Source(module, path.read_text(encoding="utf-8"), is_package=is_package)
    except (OSError, SyntaxError, ValueError) as error:
        raise NotReadError(module) from error


def _spec(module: str) -> ModuleSpec | None:
    """Find a module; unlike ``importlib.util.find_spec`` without importing the package above."""
    above, _, _ = module.rpartition(".")
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    if not above:
        return sys.modules[module].__spec__ if module in sys.modules else _top(module)
    package = _spec(above)
    if package is None:
        return None
    imported = getattr(sys.modules.get(above), "__path__", None)
    places = imported or package.submodule_search_locations
    return PathFinder.find_spec(module, list(places)) if places else None


def _top(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
