import dataclasses

import pytest

from optimum_zsaq.spec import LayerSpec, QuantScheme, QuantSpec


@pytest.mark.parametrize(
    ("spec", "lowest", "highest", "offset"),
    [  # the signed and unsigned ranges of LSQ's table, bits b: -2^(b-1) to 2^(b-1) - 1, and 0 to 2^b - 1
        pytest.param(QuantSpec(2), -2, 1, 2, id="2"),
        pytest.param(QuantSpec(3), -4, 3, 4, id="3"),
        pytest.param(QuantSpec(4), -8, 7, 8, id="4"),
        pytest.param(QuantSpec(8), -128, 127, 128, id="8"),
        pytest.param(QuantSpec(2, symmetric=False), 0, 3, 0, id="2-asymmetric"),
        pytest.param(QuantSpec(5, symmetric=False), 0, 31, 0, id="5-asymmetric"),
        pytest.param(QuantSpec(8, symmetric=False), 0, 255, 0, id="8-asymmetric"),
        pytest.param(QuantSpec(2, ternary=True), -1, 1, 2, id="ternary"),
    ],
)
def test_range_of_codes(spec, lowest, highest, offset):
    assert (spec.lowest, spec.highest, spec.offset) == (lowest, highest, offset)
    assert 0 <= spec.lowest + spec.offset
    assert spec.highest + spec.offset < 2**spec.bits


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        pytest.param(QuantSpec(4, "tensor"), (1, 1), id="tensor"),
        pytest.param(QuantSpec(4, "row"), (7, 1), id="row"),
        pytest.param(QuantSpec(4, "group", 11), (7, 3), id="divides"),
        pytest.param(QuantSpec(4, "group", 32), (7, 2), id="short-last-group"),
        pytest.param(QuantSpec(4, "group", 64), (7, 1), id="longer-than-a-row"),
    ],
)
def test_scale_shape(spec, shape):
    assert spec.scale_shape(7, 33) == shape


def test_scale_shape_refuses_granularities_of_inputs():
    with pytest.raises(ValueError, match="a weight has no granularity='token'; use one of"):
        QuantSpec(8, "token").scale_shape(2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"bits": 1}, "bits=1 is not a width we have codes for; use an integer from 2 to 8", id="1-bit"),
        pytest.param({"bits": 9}, "bits=9 ", id="9-bits"),
        pytest.param({"bits": 4.0}, r"bits=4\.0 ", id="float"),
        pytest.param({"bits": True}, "bits=True ", id="bool"),
        pytest.param({"bits": "4"}, "bits='4' ", id="string"),
        pytest.param({"bits": 4, "granularity": "channel"}, "granularity='channel' is unknown; use one of", id="name"),
        pytest.param({"bits": 4, "granularity": "group"}, "needs a group size and got group_size=None", id="no-size"),
        pytest.param({"bits": 4, "granularity": "group", "group_size": 1}, "group_size=1; use an integer", id="one"),
        pytest.param({"bits": 4, "granularity": "group", "group_size": 8.0}, r"group_size=8\.0", id="float-size"),
        pytest.param({"bits": 4, "group_size": 32}, "group_size=32 has no meaning with granularity='row'", id="pair"),
        pytest.param({"bits": 3, "ternary": True}, "three levels around zero and got bits=3", id="ternary-bits"),
        pytest.param({"bits": 2, "ternary": True, "symmetric": False}, "symmetric=False; use bits=2", id="ternary-asym"),
    ],
)
def test_illegal_spec_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"weight": QuantSpec(8, "token")}, "a weight has no granularity='token'", id="weight"),
        pytest.param({"inputs": QuantSpec(8, "row")}, "an input has no granularity='row'; use one of", id="inputs"),
        pytest.param({"inputs": QuantSpec(8, "group", 8)}, "an input has no granularity='group'", id="input-groups"),
        pytest.param({"outliers": 1.0}, r"outliers=1\.0 is not a share of the weights; use a number in \[0, 1\)", id="1"),
        pytest.param({"outliers": -0.1}, r"outliers=-0\.1 ", id="negative"),
        pytest.param({"outliers": float("nan")}, "outliers=nan ", id="nan"),
    ],
)
def test_illegal_layer_spec_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec(**{"weight": QuantSpec(4), **fields})


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize(
    "form", [pytest.param({"symmetric": True}, id="symmetric"), pytest.param({"ternary": True}, id="ternary")]
)
def test_inputs_must_be_asymmetric(granularity, form):
    """Input codes always have a zero point (`fake_quantize_tokens`, `input_zero_point`): another spec would not be kept."""
    with pytest.raises(ValueError, match="symmetric=False"):
        LayerSpec(QuantSpec(4), QuantSpec(2, granularity, **form))


@pytest.mark.parametrize(
    ("share", "count"),
    [
        pytest.param(0.0, 0, id="none"),
        pytest.param(1e-9, 1, id="at-least-one"),
        pytest.param(0.005, 2, id="rounded"),
        pytest.param(0.999, 459, id="nearly-all"),
    ],
)
def test_outlier_count(share, count):
    assert LayerSpec(QuantSpec(4), outliers=share).outlier_count(17, 27) == count


def test_outlier_count_never_exceeds_the_matrix():
    assert LayerSpec(QuantSpec(4), outliers=0.999).outlier_count(1, 1) == 1


def test_scheme_rows():
    inputs = QuantSpec(8, "token", symmetric=False)
    scheme = QuantScheme(QuantSpec(4), QuantSpec(8), inputs, outliers=0.01)
    assert scheme.linear == LayerSpec(QuantSpec(4), inputs, 0.01)
    assert scheme.embedding == LayerSpec(QuantSpec(8), None, 0.01)
    assert QuantScheme(QuantSpec(4)).embedding is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"weights": QuantSpec(8, "token")}, "a weight has no granularity='token'", id="weights"),
        pytest.param({"embeddings": QuantSpec(8, "token")}, "a weight has no granularity='token'", id="embeddings"),
        pytest.param({"activations": QuantSpec(8, "row")}, "an input has no granularity='row'", id="activations"),
        pytest.param({"outliers": 2}, "outliers=2 is not a share", id="outliers"),
    ],
)
def test_illegal_scheme_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(**{"weights": QuantSpec(4), **fields})


@pytest.mark.parametrize("value", [QuantSpec(4), LayerSpec(QuantSpec(4)), QuantScheme(QuantSpec(4))], ids=type)
def test_specs_are_frozen_values(value):
    assert {value: 1}[dataclasses.replace(value)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        value.bits = 2
