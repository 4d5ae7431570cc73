"""Rounds in turn, and the lines of the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable

Seconds = list[float]


def alternate(rounds: int, ours: Callable[[], float], bare: Callable[[], float]) -> list[Seconds]:
    """Both in turn, each first as often as second."""
    times: list[Seconds] = [[], []]
    for number in range(rounds):
        order = [(0, ours), (1, bare)]
        for index, measure in order if number % 2 else reversed(order):
            times[index].append(measure())
    return times


def head() -> str:
    return f"{'milliseconds':42} {'median':>9} {'p95':>9} {'bare':>9} {'p95':>9}   ratio  bar"


def _milliseconds(times: Seconds) -> str:
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return f"{statistics.median(times) * 1e3:9.1f} {p95 * 1e3:9.1f}"


def row(name: str, bar: str, ours: Seconds, bare: Seconds) -> str:
    ratio = statistics.median(ours) / statistics.median(bare)
    return f"{name:42} {_milliseconds(ours)} {_milliseconds(bare)} {ratio:7.2f}  {bar}"


def plain(name: str, bar: str, ours: Seconds) -> str:
    """A figure with nothing to compare it to."""
    return f"{name:42} {_milliseconds(ours)} {'':9} {'':9} {'':7}  {bar}"


def figure(name: str, ours: float, bar: str = "", other: float | None = None) -> str:
    """A figure that is no time, and what it is compared with."""
    if other is None:
        return f"{name:42} {ours:9.1f} {'':9} {'':9} {'':9} {'':7}  {bar}"
    return f"{name:42} {ours:9.2f} {'':9} {other:9.2f} {'':9} {ours / other:7.2f}  {bar}"
