"""Regular expressions for module names: few that stand for many, and a match that always comes to an end."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import regex

SECONDS = 0.5  # that a match may take; a sound one takes microseconds
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def patterns(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    r"""Return patterns for ``re.match``, each with the names it stands for; none matches any of ``others``.

    Names that differ only in their numbers share a pattern. Where ``others`` has
    such names too, the first number (the layer) is spelled out.

    >>> sorted(patterns(["a.0.q", "a.3.q", "head"], ["a.1.q"]))
    ['a\\.(0|3)\\.q$', 'head$']
    >>> sorted(patterns(["a.0.q", "a.1.q"], ["a.0.k"]))
    ['a\\.\\d+\\.q$']
    """
    taken: defaultdict[str, set[str]] = defaultdict(set)
    for name in others:
        taken[_template(name)].add(_layer(name))
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        wanted[_template(name)].append(name)
    found: dict[str, list[str]] = {}
    for template, members in wanted.items():
        found.update({re.escape(n) + "$": [n] for n in members if _layer(n) in taken[template]})
        free = [n for n in members if _layer(n) not in taken[template]]
        if not free:
            continue
        head, *tail = (re.escape(part) for part in template.split("#"))
        if taken[template]:
            layers = "|".join(sorted({_layer(n) for n in free}, key=int))
            head, *tail = (f"{head}({layers}){tail[0]}", *tail[1:])
        found[r"\d+".join((head, *tail)) + "$"] = free
    return found


def matches(pattern: str, name: str, how: Literal["match", "fullmatch", "search"], ignore_case: bool = False) -> bool:
    """Return whether a regular expression from a recipe or a configuration fits a name.

    Raises ValueError for what is no regular expression, or one that tries too many ways to fit.

    >>> matches("(a+)+$", "aaaa", "match"), matches("A", "bab", "search", ignore_case=True)
    (True, True)
    """
    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        return getattr(compiled, how)(name, timeout=SECONDS) is not None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"tries for more than {SECONDS:g} s to fit {name!r:.100}. Take out nested repetitions"
        ) from None


def _template(name: str) -> str:
    return NUMBER.sub("#", name)


def _layer(name: str) -> str:
    number = NUMBER.search(name)
    return number.group() if number else ""
