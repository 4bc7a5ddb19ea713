"""What the codes of a tensor mean: value objects without tensors, validated when they are made.

Does not: hold or compute any tensor (see `ops/`), or know which layers a model has (see `surgery.py`).
"""

from dataclasses import dataclass, field


BITS = range(2, 9)
WEIGHT_GRANULARITIES = ("tensor", "row", "group")
INPUT_GRANULARITIES = ("tensor", "token")
OUTLIER_SCOPES = ("matrix", "row")
SCALE_BITS = (16, 32)


@dataclass(frozen=True)
class QuantSpec:
    """What the integer codes of one tensor mean.

    Shapes, for a weight (O, I), of its scale (and zero point or minimum):
        "tensor" -> (1, 1); "row" -> (O, 1); "group" with `group_size=g` -> (O, ceil(I / g)), the last group may be short.
    For the input (..., I) of a layer: "tensor" (static) -> (1, 1); "token" (dynamic) -> (..., 1), found at run time.

    Args:
        bits (`int`): width of a code, 2 to 8.
        granularity (`str`): which values share a scale: "tensor", "row", "group" (weights), "tensor", "token" (inputs).
        group_size (`int`, *optional*): consecutive values of a row that share a scale; exactly with "group".
        symmetric (`bool`): True: signed codes, the full range [-2^(bits-1), 2^(bits-1) - 1], value = code * scale.
            False: codes in [0, 2^bits - 1] and an integer zero point z, value = (code - z) * scale.
        minimum (`bool`): in place of the zero point a float minimum m, value = code * scale + m, as llama.cpp's Q4_1 has
            it; asymmetric weights only.
        scale_bits (`int`): width of a stored scale (and minimum): 32 (float32) or 16 (float16).
        ternary (`bool`): three levels {-1, 0, 1} * scale, a weight is zero where it is at most 0.7 times its slice's
            mean magnitude (TWN, https://huggingface.co/papers/1605.04711, section 3.1); 2 bits, symmetric.

    Raises:
        ValueError: an illegal value, or fields that do not go together.
    """

    bits: int
    granularity: str = "row"
    group_size: int | None = None
    symmetric: bool = True
    ternary: bool = False
    minimum: bool = False
    scale_bits: int = 32

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r} is not a width we have codes for; use an integer from 2 to 8")
        allowed = sorted({*WEIGHT_GRANULARITIES, *INPUT_GRANULARITIES})
        if self.granularity not in allowed:
            raise ValueError(f"granularity={self.granularity!r} is unknown; use one of {allowed}")
        if self.granularity == "group":
            if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 2:
                raise ValueError(
                    f"granularity='group' needs a group size and got group_size={self.group_size!r}; "
                    "use an integer of at least 2, for example group_size=32"
                )
        elif self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size!r} has no meaning with granularity={self.granularity!r}; "
                "use granularity='group' or leave group_size out"
            )
        if self.ternary and (self.bits != 2 or not self.symmetric):
            raise ValueError(
                f"ternary codes have three levels around zero and got bits={self.bits!r}, "
                f"symmetric={self.symmetric!r}; use bits=2, symmetric=True"
            )
        if self.minimum and self.symmetric:
            raise ValueError("minimum=True is for asymmetric codes and got symmetric=True; use symmetric=False")
        if isinstance(self.scale_bits, bool) or self.scale_bits not in SCALE_BITS:
            raise ValueError(f"scale_bits={self.scale_bits!r} is not a width of scales; use one of {SCALE_BITS}")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return (-1 if self.ternary else -(2 ** (self.bits - 1))) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def offset(self) -> int:
        """What is added to a code so that it is stored as an unsigned integer of `bits` bits."""
        return 2 ** (self.bits - 1) if self.symmetric else 0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scale of a weight (rows, columns)."""
        if self.granularity == "tensor":
            return (1, 1)
        if self.granularity == "row":
            return (rows, 1)
        if self.granularity == "group":
            return (rows, -(-columns // self.group_size))
        raise ValueError(f"a weight has no granularity={self.granularity!r}; use one of {WEIGHT_GRANULARITIES}")


@dataclass(frozen=True)
class LayerSpec:
    """What the tensors of one layer mean: one row of a checkpoint's table.

    Args:
        weight (`QuantSpec`): the codes of the weight.
        inputs (`QuantSpec`, *optional*): the layer's input: "token" (dynamic) or "tensor" (static); None: float.
        outliers (`float`): share of the weights whose float residual is stored beside the codes, in [0, 1).
        outlier_scope (`str`): which they are: the largest of the "matrix", or as many of each "row".

    Raises:
        ValueError: a granularity that does not fit the tensor, symmetric inputs, a share outside [0, 1), an unknown scope.
    """

    weight: QuantSpec
    inputs: QuantSpec | None = None
    outliers: float = 0.0
    outlier_scope: str = "matrix"

    def __post_init__(self):
        if self.weight.granularity not in WEIGHT_GRANULARITIES:
            raise ValueError(f"a weight has no granularity={self.weight.granularity!r}; use one of {WEIGHT_GRANULARITIES}")
        if self.inputs is not None and self.inputs.granularity not in INPUT_GRANULARITIES:
            raise ValueError(f"an input has no granularity={self.inputs.granularity!r}; use one of {INPUT_GRANULARITIES}")
        if self.inputs is not None and self.inputs.symmetric:
            raise ValueError("inputs always have a zero point and got symmetric=True; use symmetric=False")
        if self.inputs is not None and (self.inputs.minimum or self.inputs.scale_bits != 32):
            raise ValueError("inputs have an integer zero point and a float32 scale; leave out minimum and scale_bits")
        if not 0.0 <= self.outliers < 1.0:
            raise ValueError(f"outliers={self.outliers!r} is not a share of the weights; use a number in [0, 1)")
        if self.outlier_scope not in OUTLIER_SCOPES:
            raise ValueError(f"outlier_scope={self.outlier_scope!r} is unknown; use one of {OUTLIER_SCOPES}")

    def text(self) -> str:
        """For people: "W4 group/32, A8 dynamic, outliers=0.005"."""
        weight, inputs = self.weight, self.inputs
        text = f"W{weight.bits} {weight.granularity}{f'/{weight.group_size}' if weight.group_size else ''}"
        if inputs is not None:
            text += f", A{inputs.bits} {'dynamic' if inputs.granularity == 'token' else 'static'}"
        scope = " of rows" if self.outlier_scope == "row" else ""
        return f"{text}, outliers={self.outliers}{scope}" if self.outliers else text

    def outlier_count(self, rows: int, columns: int) -> int:
        """How many residuals a weight (rows, columns) stores: 0 without outliers, else at least 1."""
        return max(1, round(self.outliers * rows * columns)) if self.outliers else 0


@dataclass(frozen=True)
class QuantScheme:
    """What shall become of one model's layers.

    Args:
        weights (`QuantSpec`): the Linear layers.
        embeddings (`QuantSpec`, *optional*): the input embedding tables; None: they stay float.
        activations (`QuantSpec`, *optional*): the inputs of the Linear layers; None: they stay float.
        skip (`tuple[str, ...]`): names of modules that stay float: a full name, or trailing or leading parts of one.
        outliers (`float`): share of the weights of each matrix whose float residual is stored, in [0, 1).
        outlier_scope (`str`): which they are: the largest of the "matrix", or as many of each "row".
    """

    weights: QuantSpec
    embeddings: QuantSpec | None = None
    activations: QuantSpec | None = None
    skip: tuple[str, ...] = field(default=())
    outliers: float = 0.0
    outlier_scope: str = "matrix"

    def __post_init__(self):
        if isinstance(self.skip, str):
            raise TypeError(f"skip={self.skip!r} is a string; use a tuple of strings")
        self.linear, self.embedding  # noqa: B018 -- building the rows validates them

    @property
    def linear(self) -> LayerSpec:
        """The row of a Linear layer."""
        return LayerSpec(self.weights, self.activations, self.outliers, self.outlier_scope)

    @property
    def embedding(self) -> LayerSpec | None:
        """The row of an input embedding table, None where tables stay float."""
        return LayerSpec(self.embeddings, None, self.outliers, self.outlier_scope) if self.embeddings else None
