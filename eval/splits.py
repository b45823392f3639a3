"""Write a text without the passages that it shares with others, so that it is a split disjoint from them.

    python eval/splits.py TEXT --against OTHER [OTHER ...] --out FILE

A passage is shared when 200 characters or more stand in both texts, whitespace not
counted apart (every run of it is one space). The line on which a shared passage stands
is told for both texts.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from llmquant import data

RUN = 200  # characters that two splits may not share


@dataclass(frozen=True)
class Passage:
    """What two texts share: characters ``start`` to ``end`` of the first, which are at ``other`` in the second."""

    start: int
    end: int
    other: int


def read(path: Path) -> str:
    """Return a text as it is calibrated or evaluated on."""
    return "\n\n".join(data.documents(data.TextSource(path=path), None))


def shared_passages(text: str, other: str, run: int = RUN) -> list[Passage]:
    """Return the passages of ``text`` whose every window of ``run`` characters stands in ``other``, in order."""
    (a, places), (b, other_places) = _normalised(text), _normalised(other)
    known = {hash(b[i : i + run]) for i in range(len(b) - run + 1)}
    found: list[tuple[int, int]] = []
    for i in range(len(a) - run + 1):
        if hash(a[i : i + run]) in known:
            start = found.pop()[0] if found and found[-1][1] >= i else i
            found.append((start, i + run))
    return [
        Passage(places[start], places[end - 1] + 1, other_places[b.index(a[start : start + run])])
        for start, end in found
    ]


def check_disjoint(splits: Mapping[str, Path]) -> None:
    """Stop the study unless no two of the named texts are the same file or share a passage."""
    for (name, path), (other_name, other) in combinations(splits.items(), 2):
        if path.samefile(other):
            raise SystemExit(f"{name} and {other_name} are the same file, {path}. Give disjoint texts.")
        text, other_text = read(path), read(other)
        passages = shared_passages(text, other_text)
        if passages:
            first = passages[0]
            raise SystemExit(
                f"{name} and {other_name} share {len(passages)} passages of {RUN} characters or more, in all "
                f"{sum(p.end - p.start for p in passages)} characters; the first is at line {line(text, first.start)} "
                f"of {path} and line {line(other_text, first.other)} of {other}: "
                f"{text[first.start : first.start + 60]!r}. Cut them out: "
                f"python eval/splits.py {path} --against {other} --out FILE"
            )


def without(text: str, passages: list[Passage]) -> str:
    """Return a text without some of its passages."""
    ends = [0, *(p.end for p in passages)]
    starts = [*(p.start for p in passages), len(text)]
    return "".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def line(text: str, place: int) -> int:
    """Return the number of the line, from 1, on which a character stands."""
    return text.count("\n", 0, place) + 1


def _normalised(text: str) -> tuple[str, list[int]]:
    """Return a text with every run of whitespace as one space, and where each of its characters stood."""
    pieces, places = [], []
    for word in re.finditer(r"\S+", text):
        pieces.append(word.group())
        places += [*range(word.start(), word.end()), word.end()]
    return " ".join(pieces), places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--against", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = read(args.text)
    for other in args.against:
        known = read(other)
        passages = shared_passages(text, known)
        for p in passages:
            print(
                f"{args.text}:{line(text, p.start)} and {other}:{line(known, p.other)} share {p.end - p.start} "
                f"characters: {text[p.start : p.start + 60]!r}"
            )
        text = without(text, passages)
    args.out.write_text(text, "utf-8")
    check_disjoint({"the text": args.out} | {f"text {i}": other for i, other in enumerate(args.against, 1)})


if __name__ == "__main__":
    main()
