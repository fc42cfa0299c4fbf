"""Times ways to do the same in turns, so that whatever else the machine does hits them alike."""

import statistics
from collections.abc import Callable


def measure(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, in alternating order.

    A way takes the number of the round and returns the seconds that it took. Round 0 comes first and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            taken = ways[name](number)
            if number:
                seconds[name].append(taken)
    return seconds


def quartiles(values: list[float]) -> str:
    """The median, with the quartiles in brackets."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f}, {len(values)} pairs)"


def ratios(seconds: dict[str, list[float]], way: str, other: str) -> list[float]:
    """How many times as fast `way` was as `other`, in each round."""
    return [slow / fast for fast, slow in zip(seconds[way], seconds[other], strict=True)]
