"""Blocks in files: what memory does not hold is trained as if it did."""

import copy
import resource
import subprocess
import sys

import pytest
import torch
from tiny_models import inputs, make

from optimum_zsaq import QuantScheme
from optimum_zsaq.algorithms.offload import OffloadedBlocks
from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings, SequentialReconstruction
from optimum_zsaq.layers import PackedLinear
from optimum_zsaq.surgery import blocks, prepare


def offload(model) -> OffloadedBlocks:
    """Takes the weights of a model's blocks out of it."""
    kept = OffloadedBlocks(blocks(model), "minmax")
    for block in kept.blocks:
        for name, p in model.get_submodule(block).named_parameters():
            kept.put(f"{block}.{name}", p)
        kept.free(block, model)
    return kept
