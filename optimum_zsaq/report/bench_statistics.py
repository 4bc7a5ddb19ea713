"""Statistics of interleaved timings: a median, and the paired ratio to a baseline, each with a bootstrap interval.

Percentile bootstrap over the rounds. Our choice: medians, because a busy machine adds time and never takes any away.
"""

from collections.abc import Mapping, Sequence

import numpy as np


RESAMPLES = 5_000
LEVEL = 0.95


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of values (n,), and the interval that holds it with probability 0.95: (median, low, high).

    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("a median needs at least one value; got none")
    data = np.asarray(values, dtype=np.float64)
    index = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[index], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.median(data)), float(low), float(high)


def paired_ratio(
    times: Mapping[int, float], baseline: Mapping[int, float], seed: int = 0
) -> tuple[float, float, float] | None:
    """Median over the rounds that both have of time / the baseline's time in the same round: (ratio, low, high).

    What slows a whole round down (another process, a lower clock) is in both times and cancels out.

    Args:
        times (`Mapping[int, float]`): round -> seconds.
        baseline (`Mapping[int, float]`): round -> seconds of the baseline.

    Returns:
        None where no round has both.
    """
    rounds = sorted(times.keys() & baseline.keys())
    return median_interval([times[r] / baseline[r] for r in rounds], seed) if rounds else None
