"""Where the parts of a plot are: numbers in, places in a drawing of a fixed size out (``templates/plots.html``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, TALL, FLAT = 440.0, 300.0, 180.0  # of every plot: as wide as a phone, so that letters stay legible there
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 14.0, 36.0  # margins
LETTER = 6.2  # width, about
LINE = 12.0  # height of a line of letters
TICKS = 5  # about


def short(value: float) -> str:
    """Return a number in as few characters as tell it apart from its neighbours on an axis.

    >>> [short(x) for x in (0.0, 0.25, 12.0, 1500.0, 0.00002)]
    ['0', '0.25', '12', '1500', '2e-5']
    """
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


@dataclass(frozen=True)
class Axis:
    """A range of values, and the places of its ends in the drawing; y grows downwards there."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value; what is outside of the range is at its end."""
        low, high, here = (math.log(x) if self.log else x for x in (self.low, self.high, self._inside(value)))
        return round(self.start + (here - low) / (high - low) * (self.end - self.start), 1)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Some round values of the range: place and label."""
        return [(self.at(value), short(value)) for value in self._round_values()]

    def _round_values(self) -> list[float]:
        if self.log:
            for of_decade in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                values = [m * 10.0**p for p in powers for m in of_decade if self.low <= m * 10.0**p <= self.high]
                if len(values) >= TICKS - 2:
                    return values
        step = _round_step((self.high - self.low) / TICKS)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(about: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= about * (1 - 1e-9))


def spread(values: Iterable[float], start: float, end: float, log: bool = False, zero: bool = False) -> Axis:
    """Return an axis with room for some values: beyond them on both sides, or from zero on."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** 0.12, 1.25)
        return Axis(low / room, high * room, start, end, log=True)
    if zero:
        return Axis(0.0, high * 1.08 or 1.0, start, end)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


@dataclass(frozen=True)
class Point:
    """error: of y, in both directions. series: which of some kinds it is of, from 0. label: shown beside it."""

    x: float
    y: float
    error: float
    series: int
    label: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A point in its place. bar: the ends of its error, from above. label_at, anchor: of its label, if it has one."""

    x: float
    y: float
    bar: tuple[float, float]
    point: Point
    label_at: tuple[float, float] | None
    anchor: str


@dataclass(frozen=True)
class Frame:
    """What every plot has."""

    x: Axis
    y: Axis
    height: float

    @property
    def width(self) -> float:
        return WIDTH


def _frame(height: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ends of both axes."""
    return (LEFT, WIDTH - RIGHT), (height - BOTTOM, TOP)


@dataclass(frozen=True)
class Scatter(Frame):
    """frontier: the line through the points that no other is left of and below. level: of a line across."""

    marks: tuple[Mark, ...]
    frontier: str
    level: float | None


def scatter(points: Sequence[Point], log: bool, level: float | None = None) -> Scatter:
    """Return points in their places; with ``log``, y is logarithmic.

    level: a value of y that is worth a line.
    """
    across, up = _frame(TALL)
    x = spread((p.x for p in points), *across)
    y = spread([p.y for p in points] + ([] if level is None else [level]), *up, log=log)
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    line = "L".join(f"{x.at(p.x)} {y.at(p.y)}" for p in best)
    marks: list[Mark] = []
    taken = [_around(x.at(p.x), y.at(p.y)) for p in points]
    for p in points:
        here = x.at(p.x), y.at(p.y)
        ends = y.at(p.y + p.error), y.at(max(p.y - p.error, y.low))
        label_at, anchor = _place(here, p.label, taken) if p.label else (None, "start")
        marks.append(Mark(*here, ends, p, label_at, anchor))
    across_at = None if level is None else y.at(level)
    return Scatter(x, y, TALL, tuple(marks), f"M{line}" if len(best) > 1 else "", across_at)


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _around(x: float, y: float) -> Box:
    return x - 5, y - 5, x + 5, y + 5


def _place(here: tuple[float, float], label: str, taken: list[Box]) -> tuple[tuple[float, float] | None, str]:
    """Return a free place for a label beside a point, and take it; None where there is none."""
    (x, y), wide = here, LETTER * len(label)
    for step in (0.0, LINE, -LINE, 2 * LINE, -2 * LINE):
        for anchor, left in (("start", x + 8), ("end", x - 8 - wide)):
            box = left, y + step - LINE / 2, left + wide, y + step + LINE / 2
            inside = left > LEFT and left + wide < WIDTH and box[1] > 0 and box[3] < TALL - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                return (round(left if anchor == "start" else left + wide, 1), round(y + step + 4, 1)), anchor
    return None, "start"


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class Bars(Frame):
    """bars: left, top, width and height of each, and what it says. names: of some of them, with their places."""

    bars: tuple[tuple[float, float, float, float, str], ...]
    names: tuple[tuple[float, str], ...]


def bars(values: Sequence[tuple[str, float]]) -> Bars:
    """Return upright bars. Of many that are numbered, every second or so has its number below it."""
    across, up = _frame(FLAT)
    y = spread((value for _, value in values), *up, zero=True)
    x = Axis(0.0, float(len(values)), *across)
    wide = (across[1] - across[0]) / len(values)
    thick = round(min(max(wide - 2, wide * 0.7), 36.0), 1)
    step = math.ceil(LETTER * (len(str(len(values))) + 1) / wide)
    found, names = [], []
    free = 0.0
    for i, (name, value) in enumerate(values):
        middle, top, half = x.at(i + 0.5), y.at(value), LETTER * len(name) / 2
        found.append((round(middle - thick / 2, 1), top, thick, round(up[0] - top, 1), f"{name}: {short(value)}"))
        place = min(middle, WIDTH - half)
        if place - half >= free and not (name.isdigit() and i % step):
            names.append((place, name))
            free = place + half
    return Bars(x, y, FLAT, tuple(found), tuple(names))


@dataclass(frozen=True)
class Lines(Frame):
    """lines: name and path of each."""

    lines: tuple[tuple[str, str], ...]


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], log: bool = False) -> Lines:
    """Return lines through points (x, y), each with a name; with ``log``, y is logarithmic."""
    across, up = _frame(FLAT)
    xs, ys = ([point[i] for _, points in series for point in points] for i in (0, 1))
    x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, *across)
    y = spread(ys, *up, log=log, zero=not log)
    paths = ((name, "M" + "L".join(f"{x.at(a)} {y.at(b)}" for a, b in points)) for name, points in series)
    return Lines(x, y, FLAT, tuple(paths))


@dataclass(frozen=True)
class Histogram(Frame):
    """area: the outline of the bins. stems: place, top and title of each level."""

    area: str
    stems: tuple[tuple[float, float, str], ...]


def histogram(
    weights: Sequence[int],
    low: float,
    high: float,
    levels: Sequence[float],
    codes: Sequence[int],
) -> Histogram:
    """Return how weights lie on an axis from low to high, and the levels with the share of weights that got each.

    The bins have the height of their density: as many weights as they would have if they were as wide as the step
    between two levels is on average. So both are of one scale.
    """
    across, up = _frame(FLAT)
    x = Axis(low, high, *across)
    step = (levels[-1] - levels[0]) / (len(levels) - 1)
    wide = (high - low) / len(weights)
    density = [100 * n / max(sum(weights), 1) * step / wide for n in weights]
    shares = [100 * n / max(sum(codes), 1) for n in codes]
    y = spread([*density, *shares], *up, zero=True)
    edges = [x.at(low + i * wide) for i in range(len(weights) + 1)]
    outline = "".join(f"V{y.at(d)}H{right}" for d, (_, right) in zip(density, pairwise(edges), strict=True))
    stems = (
        (x.at(level), y.at(share), f"level {short(level)}: {share:.2g} %")
        for level, share in zip(levels, shares, strict=True)
    )
    return Histogram(x, y, FLAT, f"M{edges[0]} {up[0]}{outline}V{up[0]}Z", tuple(stems))
