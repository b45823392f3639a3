"""Few regular expressions for many module names, so that a config file stays readable."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

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


def _template(name: str) -> str:
    return NUMBER.sub("#", name)


def _layer(name: str) -> str:
    number = NUMBER.search(name)
    return number.group() if number else ""
