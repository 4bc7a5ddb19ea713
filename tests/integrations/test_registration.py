"""Making the package known to transformers, once, however often and from wherever it is asked."""

from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

from optimum_zsaq import kinds, register
from optimum_zsaq.integrations.configs import LowBitConfig
from optimum_zsaq.integrations.models import TransformersReader


def test_register_twice_changes_nothing():
    register()
    before = (
        dict(auto.AUTO_QUANTIZER_MAPPING),
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
        list(kinds._READERS),
        dict(kinds.KINDS),
    )
    register()
    after = (
        dict(auto.AUTO_QUANTIZER_MAPPING),
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
        list(kinds._READERS),
        dict(kinds.KINDS),
    )
    assert before == after
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(LowBitConfig) == 1
    assert sum(isinstance(reader, TransformersReader) for reader in kinds._READERS) == 1
    assert Conv1D in kinds.KINDS
