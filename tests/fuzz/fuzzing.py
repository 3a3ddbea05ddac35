"""What the fuzzers share: seeds, time limits, alterations of values, texts and bytes.

The cases of a seed are always the same. ``FUZZ_ROUNDS=N`` (``make fuzz ROUNDS=N``) runs N times as
many, the later ones with seeds that were not tried before.
"""

import os
import random
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from wsss.core.errors import WSSSError

T = TypeVar("T")
ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "1"))
SECONDS = 20  # of processor time for one case
LONGEST = 2000  # characters of a refusal
MEMORY = 6 * 2**30  # bytes that a case may claim beside those of the process so far

DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]

#: values that are of no use anywhere, or only in some places
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 0.5, -0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"),
    float("inf"), -float("inf"), 2**31, -(2**31), 2**63, 10**30, -(10**30), "", " ", "1", "-1",
    "nan", "null", "true", "ä", "a\u0308", "\ud800", "a\nb", "\0", "\x1b[31m", "x" * 300,
    "../../x", "/etc", "C:\\x", "a\\b", "a;b", "a,b", "=1+1", "<b>", "${oc.env:SECRET}", "${seed}",
    "???", "#x", [], {}, [[]], [None], [1, 2], [-1, 0.5], ["a"], {"a": 1}, DEEP,
    {"_target_": "os.system"}, {"size": [1, 1]},
]  # fmt: skip


class TooLongError(BaseException):
    """A case takes too long; no handler of errors takes it for a damaged file."""


def seeds(count: int) -> range:
    """Give the seeds of a fuzzer that tries so many cases in one round."""
    return range(count * ROUNDS)


@contextmanager
def limits() -> Iterator[None]:
    """Let nothing run for ever, or claim memory without end."""

    def stop(number: int, frame: Any) -> None:
        raise TooLongError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)  # pytest-timeout has SIGALRM
    claimed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (claimed + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def outcome(case: str, call: Callable[[], T]) -> T | WSSSError:
    """Give what a call gives, or the refusal that it ends in; nothing else may happen.

    Args:
        case: seed and alteration, named where something else happens.
        call: real code.
    """
    try:
        with limits():
            return call()
    except WSSSError as error:
        text = str(error)
        assert text.strip(), f"{case}: a refusal without a word"
        assert len(text) < LONGEST, f"{case}: {len(text)} characters: {text[:300]}"
        assert "\n" not in text, f"{case}: several lines: {text[:300]!r}"
        assert "swordfish" not in text, f"{case}: gives a secret away"
        return error
    except BaseException as error:
        error.add_note(case)
        raise


def altered(rng: random.Random, tree: Any, times: int) -> tuple[Any, str]:
    """Alter a copy of a tree of JSON at some places, and say how."""
    said = []
    for _ in range(times):
        place, kind = rng.choice(list(_places(tree))), rng.randrange(8)
        tree, what = _alter(rng, tree, place, kind)
        said.append(f"{'.'.join(map(str, place))}: {what}")
    return tree, "; ".join(said)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if len(path) < 12:
        for key, child in _children(tree):
            yield from _places(child, (*path, key))


def _children(tree: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return enumerate(tree) if isinstance(tree, list) else ()


def _alter(rng: random.Random, tree: Any, place: tuple[Any, ...], kind: int) -> tuple[Any, str]:
    """Copy what lies on the way to a place, and alter that."""
    key, *rest = place
    copy = dict(tree) if isinstance(tree, Mapping) else list(tree)
    if rest:
        copy[key], what = _alter(rng, copy[key], tuple(rest), kind)
        return copy, what
    value = copy[key]
    if kind == 0:
        del copy[key]
        return copy, "removed"
    if kind == 1 and isinstance(copy, list):
        copy.insert(key, value)
        return copy, "doubled"
    if kind == 2 and type(value) in (int, float):
        copy[key] = rng.choice([-value, value + 1, value - 1, value * 1e9, str(value), value / 3])
    elif kind == 3 and isinstance(value, str):
        copy[key] = text_altered(rng, value)
    elif kind == 4 and len(copy) > 1:
        other = rng.choice([k for k, _ in _children(copy)])
        copy[key], copy[other] = copy[other], value
        return copy, f"swapped with {other}"
    elif kind == 5 and isinstance(value, list | dict):
        copy[key] = type(value)()
    elif kind == 6 and isinstance(value, list):
        copy[key] = [*value[: rng.randrange(len(value) + 1)], rng.choice(STRANGE)]
    else:
        copy[key] = rng.choice(STRANGE)
    return copy, f"{str(copy[key])[:60]!r}"


#: what is put into texts: marks of encodings, separators, quotes, what a terminal obeys
BITS = [
    "\ufeff", "\0", ",", ";", "|", '"', "'", "\n", "\r\n", "\r", "\t", " ", "\\", "/", "../", "ä",
    "a\u0308", "\u2028", "\u200b", "=", "#", "\x1b[2J", "-1", "1e309", "<", "&", "]]>", "x" * 200,
]  # fmt: skip


def text_altered(rng: random.Random, text: str) -> str:
    """Put something into a text, take a part of it away, or repeat one."""
    at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    to = min(to, at + 20)
    return rng.choice(
        [
            text[:at] + rng.choice(BITS) + text[at:],
            text[:at] + text[to:],
            text[:to] + text[at:to] + text[to:],
            text[:at] + text[at:to].swapcase() + text[to:],
        ]
    )


def bytes_altered(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Flip bits, cut, repeat or empty a file, and say how."""
    kind = rng.choice(["flip", "flip", "flip", "cut", "overwrite", "repeat", "empty"])
    at = rng.randrange(len(content) + 1)
    changed = bytearray(content)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "overwrite":
        changed[at : at + 16] = rng.randbytes(16)
    elif kind == "repeat":
        changed[at:at] = changed[at : at + 64]
    else:
        changed.clear()
    return bytes(changed), f"{kind} at {at}"
