"""Paired bootstrap: how sure is the difference between two models that were measured on the same samples."""

from collections.abc import Sequence

import numpy as np


RESAMPLES = 10_000
_CHUNK = 500  # resamples drawn together: bounds the memory


def paired_interval(
    scores: Sequence[float], others: Sequence[float], resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `scores - others`, and the interval that holds it with probability `level` (percentile bootstrap).

    Shapes: scores (n,), others (n,), one pair a sample -> (mean, low, high).

    Raises:
        ValueError: different numbers of scores, or none.
    """
    if len(scores) != len(others) or not len(scores):
        raise ValueError(
            f"paired scores come in pairs, and there are {len(scores)} and {len(others)}; measure the same samples"
        )
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    generator, n = np.random.default_rng(seed), len(difference)
    means = []
    for start in range(0, resamples, _CHUNK):
        index = generator.integers(n, size=(min(_CHUNK, resamples - start), n))
        means.append(difference[index].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def to_bitmap(right: Sequence[float]) -> str:
    """Which samples are right, four to a hexadecimal digit, the first sample in the highest bit."""
    return np.packbits(np.asarray(right) > 0).tobytes().hex()


def from_bitmap(bitmap: str, count: int) -> np.ndarray:
    """The scores (count,) of a bitmap, 1.0 right and 0.0 wrong."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(bitmap), dtype=np.uint8))[:count].astype(np.float64)
