"""Layers, one type a state: `FakeQuant...` (trainable: float master weight and scales), `Packed...` (codes and scales)."""

from .common import LowBitLayer
from .fake import FakeQuantEmbedding, FakeQuantLinear, FakeQuantTransposedLinear
from .packed import PackedEmbedding, PackedLinear, PackedTransposedLinear


__all__ = [
    "FakeQuantEmbedding",
    "FakeQuantLinear",
    "FakeQuantTransposedLinear",
    "LowBitLayer",
    "PackedEmbedding",
    "PackedLinear",
    "PackedTransposedLinear",
]
