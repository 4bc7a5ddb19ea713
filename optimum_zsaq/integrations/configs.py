"""Quantization configs: what is on disk, and the settings of the algorithm that found the numbers.

`LowBitConfig` reads every checkpoint. Its subclasses, one an algorithm, are what users construct.
"""

import copy
import json
from collections import Counter
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kinds import ModelFacts, kind_of, reader_of
from ..layers.packed import check_runtime
from ..spec import OUTLIER_SCOPES, LayerSpec, QuantScheme, QuantSpec
from ..surgery import low_bit_layers, tied_row
from .models import is_decoder


QUANT_METHOD = "zsaq"
FORMAT_VERSION = 2  # 1 had no minima and no float16 scales
RANGE_METHODS = ("auto", "mse", "minmax", "signed", "lsq", "ternary")

ALGORITHMS: dict[str, type["LowBitConfig"]] = {}
_GROUPED_BITS = 6  # wider codes hold with a scale a row: our choice, measured in docs/methods/language_models.md
_GROUP_SIZE = 64
_SMOOTHING = 0.7  # our choice, measured in docs/methods/language_models.md
_STORED = ("quant_method", "format_version", "algorithm", "packed", "modules", "recipe")
_NEVER_STORED = ("runtime", "kernel", "calibration_data")


class LowBitConfig(QuantizationConfigMixin):
    """What a low-bit checkpoint is; common fields of every algorithm's config.

    Args:
        weight_bits (`int`): width of the codes of Linear layers, 2 to 8.
        embedding_bits (`int`, *optional*): width of the codes of the input embedding tables; None: they stay float.
        activation_bits (`int`, *optional*): width of the inputs of Linear layers; None: they stay float.
        granularity (`str`): which weights share a scale: "row", "tensor", "group", or "auto": groups for decoders at up to
            6 bits, else rows (docs/methods/language_models.md). Tables have a scale a row, or a group where groups were
            asked for. Scales of groups are stored as float16, others as float32.
        group_size (`int`, *optional*): consecutive weights that share a scale; None: 64, with granularity="group".
        symmetric (`bool`, *optional*): weights without (True) or with (False) a zero point or minimum; None: groups have
            one.
        minimum (`bool`, *optional*): asymmetric weights have a float minimum (True), stored like the scale, or an integer
            zero point of a byte (False); None: groups have a minimum.
        ranges (`str`): how scales are found: "mse", "minmax", "signed" (mse, some scales negative), "lsq"
            (LSQ's start value), "ternary" (2 bits, TWN), "auto" (by the scheme, see `surgery.range_method`).
        activations (`str`): "dynamic": a range a token, found as it runs; "static": one stored range a layer.
        modules_to_not_convert (`list[str]`, *optional*): runs of name parts, such as "pooler" or "encoder.layer.0", of
            layers that stay float, in addition to heads, which always do.
        smoothing (`float`, *optional*): power of the root mean square of an input channel that moves into the weights
            before they are rounded, 0 to 1, where what makes the channel allows it (`algorithms/smoothing.py`): coarse
            inputs get easier, coarse weights harder. 0: nothing moves; None: 0.7 for decoders whose inputs have a stored
            range, or low bits and weights of more than 6 bits, else 0 (docs/methods/language_models.md).
        outliers (`float`, *optional*): share of each matrix whose float residual is stored beside the codes, in (0, 1).
        outlier_scope (`str`): which they are: "matrix": its largest magnitudes; "row": those of each row, as many of each.
            Both measured in docs/methods/prequant_adapters.md.
        runtime (`str`): "fast" keeps up to a byte a weight beside the codes while running, "small" only the codes, as on
            disk. A loading attribute: not stored.
        kernel (`str`, *optional*): the only kernel allowed, such as "reference"; None: the fastest. A loading attribute.
        calibration_data (*optional*): what static input ranges are measured on: a list of strings or of dicts with "text"
            and "text_pair", a `datasets.Dataset`, or a file; None: sampled token sequences. Its text is never stored.
        calibration_samples (`int`): sequences used of it, from its beginning.
        seed (`int`): of the sampled sequences.
        packed (`bool`): True: codes; False: float master weights, fake-quantized, to be trained. True by default.

    Raises:
        ValueError: an unknown field, an illegal value, fields that do not go together, a newer format.
    """

    algorithm = "none"
    knows_energies = False
    learns_step_sizes = False
    range_methods = RANGE_METHODS

    def __init__(
        self,
        weight_bits: int = 4,
        embedding_bits: int | None = 8,
        activation_bits: int | None = 8,
        granularity: str = "auto",
        group_size: int | None = None,
        symmetric: bool | None = None,
        minimum: bool | None = None,
        ranges: str = "auto",
        activations: str = "dynamic",
        modules_to_not_convert: list[str] | None = None,
        outliers: float | None = None,
        outlier_scope: str = "matrix",
        runtime: str = "fast",
        kernel: str | None = None,
        smoothing: float | None = None,
        calibration_data: Any = None,
        calibration_samples: int = 128,
        seed: int = 0,
        **stored: Any,
    ):
        self._check_fields(stored)
        if stored.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise ValueError(f"quant_method={stored['quant_method']!r} is another package's; ours is {QUANT_METHOD!r}")
        self.quant_method = QUANT_METHOD
        self.format_version = stored.get("format_version", FORMAT_VERSION)
        self.packed = stored.get("packed", True)
        self.modules = stored.get("modules")
        self.recipe = stored.get("recipe")
        self.weight_bits, self.embedding_bits, self.activation_bits = weight_bits, embedding_bits, activation_bits
        self.granularity, self.group_size = granularity, group_size
        self.symmetric, self.minimum = symmetric, minimum
        self.ranges, self.activations = ranges, activations
        self.modules_to_not_convert = _list_of_names(modules_to_not_convert)
        self.outliers, self.outlier_scope, self.smoothing = outliers, outlier_scope, smoothing
        self.runtime, self.kernel = runtime, kernel
        self.calibration_data, self.calibration_samples, self.seed = calibration_data, calibration_samples, seed
        self._check_values()

    def _check_fields(self, stored: dict[str, Any]) -> None:
        for name in stored:
            if name not in _STORED:
                known = [field for field in self._fields() if field not in _STORED]
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {known}"
                raise ValueError(f"{type(self).__name__} has no field {name!r}; {hint}")
        version = stored.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}: this checkpoint's format is not one that this optimum-zsaq reads "
                f"(1 to {FORMAT_VERSION}); run `pip install --upgrade optimum-zsaq`"
            )

    @classmethod
    def _fields(cls) -> list[str]:
        names = LowBitConfig.__init__.__code__.co_varnames[1 : LowBitConfig.__init__.__code__.co_argcount]
        return [*names, *_STORED]

    def _check_values(self) -> None:
        for name, allowed in (
            ("granularity", ("auto", "row", "tensor", "group")),
            ("ranges", self.range_methods),
            ("activations", ("dynamic", "static")),
            ("symmetric", (True, False, None)),
            ("minimum", (True, False, None)),
            ("outlier_scope", OUTLIER_SCOPES),
            ("packed", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use one of {allowed}")
        check_runtime(self.runtime, self.kernel)
        for name in ("weight_bits", "embedding_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is None and name != "weight_bits":
                continue
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                none = "" if name == "weight_bits" else ", or None to leave them float"
                raise ValueError(f"{name}={bits!r} is not a width we have codes for; use an integer from 2 to 8{none}")
        if self.ranges == "ternary" and self.weight_bits != 2:
            raise ValueError(
                f"ranges='ternary' has three levels and got weight_bits={self.weight_bits!r}; "
                "use weight_bits=2 or ranges='mse'"
            )
        if self.ranges == "ternary" and self.symmetric is False:
            raise ValueError("ranges='ternary' is symmetric and got symmetric=False; use symmetric=True or ranges='mse'")
        if self.minimum and (self.symmetric or self.ranges == "ternary"):
            raise ValueError(
                f"minimum=True is for asymmetric weights and got symmetric={self.symmetric!r}, ranges={self.ranges!r}; "
                "use symmetric=False, or leave minimum out"
            )
        self._check_smoothing()
        self._check_calibration_data()
        if self.activations == "static" and self.activation_bits is None:
            raise ValueError("activations='static' needs a width; use activation_bits=8 or activations='dynamic'")
        if self.outliers is not None and not (isinstance(self.outliers, int | float) and 0.0 < self.outliers < 1.0):
            raise ValueError(f"outliers={self.outliers!r} is not a share of the weights; use a number in (0, 1) or None")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} is not an integer; use one, such as 0")
        if not isinstance(self.calibration_samples, int) or self.calibration_samples < 1:
            raise ValueError(f"calibration_samples={self.calibration_samples!r} is not a count; use at least 1")
        self.scheme()
        if self.modules is not None:
            try:
                self._check_modules()
            except (KeyError, TypeError, AttributeError, _TableError) as error:
                raise ValueError(
                    f"the table `modules` in the quantization_config is damaged ({error!r}); "
                    "restore config.json from where the checkpoint came from"
                ) from error

    def _check_smoothing(self) -> None:
        power = 0.0 if self.smoothing is None else self.smoothing
        if isinstance(power, bool) or not isinstance(power, int | float) or not 0.0 <= power <= 1.0:
            raise ValueError(f"smoothing={power!r} is no power of a channel's size; use a number from 0 to 1, or None")
        if power and not self.knows_energies:
            raise ValueError(
                f"smoothing={power!r} looks at inputs of the float model, which {type(self).__name__} does not; omit it"
            )

    def _check_calibration_data(self) -> None:
        if self.calibration_data is not None and (self.activations != "static" or self.activation_bits is None):
            raise ValueError(
                "calibration_data measures static input ranges and got "
                f"activations={self.activations!r}, activation_bits={self.activation_bits!r}; "
                "use activations='static' with activation_bits=8, or leave calibration_data out"
            )

    def _check_modules(self) -> None:
        """The table decides what is read; the settings beside it must not tell another story."""
        rows = self.default_rows()
        for row in self.modules["exceptions"].values():
            _row(row)
        if not isinstance(self.modules["float"], list):
            raise _TableError(f"float={self.modules['float']!r} is no list")
        for name, row in (("weight_bits", rows["linear"]), ("embedding_bits", rows["embedding"])):
            if row is not None and getattr(self, name) != row.weight.bits:
                raise ValueError(
                    f"the quantization_config disagrees with itself: {name}={getattr(self, name)!r}, but its table has "
                    f"{row.weight.bits} bits; restore config.json from where the checkpoint came from"
                )

    def scheme(self, model: nn.Module | None = None) -> QuantScheme:
        """What these settings make of a float model.

        Args:
            model (`nn.Module`, *optional*): decides what is left to us; None: as for an encoder.
        """
        ternary, asked = self.ranges == "ternary", self.granularity
        if asked == "auto" and self.group_size is not None:
            asked = "group"
        granularity = asked
        if asked == "auto":
            in_groups = is_decoder(model) and self.weight_bits <= _GROUPED_BITS and not ternary
            granularity = "group" if in_groups else "row"
        weights = self._weight_spec(self.weight_bits, granularity, ternary)
        of_tables, ternary = "group" if asked == "group" else "row", ternary and self.embedding_bits == 2
        embeddings = self.embedding_bits and self._weight_spec(self.embedding_bits, of_tables, ternary)
        granularity = "token" if self.activations == "dynamic" else "tensor"
        activations = self.activation_bits and QuantSpec(self.activation_bits, granularity, symmetric=False)
        skip = tuple(self.modules_to_not_convert or ())
        return QuantScheme(weights, embeddings or None, activations or None, skip, self.outliers or 0.0, self.outlier_scope)

    def _weight_spec(self, bits: int, granularity: str, ternary: bool) -> QuantSpec:
        grouped = granularity == "group"
        size = _GROUP_SIZE if grouped and self.group_size is None else self.group_size
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = ternary or not (grouped or self.minimum)
        minimum = not symmetric and (grouped if self.minimum is None else self.minimum)
        return QuantSpec(bits, granularity, size, symmetric, ternary, minimum, scale_bits=16 if grouped else 32)

    def ranges_for(self, model: nn.Module) -> str:
        """How the scales of a model are found; "auto" is "energy" for decoders, where the float model is run."""
        return "energy" if self.ranges == "auto" and self.knows_energies and is_decoder(model) else self.ranges

    def smoothing_for(self, model: nn.Module) -> float:
        """The power with which a model is smoothed; see the field."""
        if self.smoothing is not None or not self.knows_energies:
            return self.smoothing or 0.0
        coarse = self.activations == "static" or self.weight_bits > _GROUPED_BITS
        return _SMOOTHING if self.activation_bits is not None and coarse and is_decoder(model) else 0.0

    def runs_float_model(self, model: nn.Module) -> bool:
        """Whether the float model is run before it is quantized, instead of quantizing each weight as it is read."""
        return False

    # The table of specs by module ------------------------------------------------------------------------------------

    def default_rows(self) -> dict[str, LayerSpec | None]:
        """The table's default rows, "linear" and "embedding"."""
        return {kind: _row(self.modules[kind]) for kind in ("linear", "embedding")}

    def stored_table(self) -> dict[str, Any]:
        """What config.json and the header of every file say alike: the table, and whether it is packed."""
        return {"packed": self.packed, **(self.modules or {})}

    def describe_model(self, model: nn.Module) -> None:
        """Write the table of a model's low-bit layers, and the list of what stays float, into this config."""
        facts = reader_of(model).facts(model)
        layers = {name: layer for name, layer in low_bit_layers(model) if layer.owner is layer}
        rows: dict[str, list[tuple[str, LayerSpec]]] = {"linear": [], "embedding": []}
        for name, layer in layers.items():
            rows["embedding" if kind_of(layer).table else "linear"].append((body_name(model, name), layer.spec))
        default = {kind: _most_common([row for _, row in found]) for kind, found in rows.items()}
        self.modules = {kind: row and asdict(row) for kind, row in default.items()}
        self.modules["exceptions"] = {
            name: asdict(row) for kind, found in rows.items() for name, row in found if row != default[kind]
        }
        self.modules["float"] = [body_name(model, name) for name in _float_layers(model, facts)]

    def table(self, model: nn.Module) -> dict[str, LayerSpec]:
        """The layers of a float model that this checkpoint holds in low bits: name -> row, tied layers included."""
        facts = reader_of(model).facts(model)
        default, table = self.default_rows(), {}
        for name, module in model.named_modules():
            kind = kind_of(module)
            short = body_name(model, name)
            if kind is None or short in self.modules["float"] or name in facts.tied:
                continue
            wanted = name in facts.tables if kind.table else name not in facts.heads
            exception = self.modules["exceptions"].get(short)
            row = _row(exception) if exception else default["embedding" if kind.table else "linear"]
            if row is not None and (wanted or exception):
                table[name] = row
        for name, owner in facts.tied.items():
            if owner in table and kind_of(model.get_submodule(name)) is not None:
                table[name] = tied_row(model, name, owner, table[owner])
        return table

    # transformers' contract ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The JSON that is stored; loading attributes and calibration data are left out."""
        fields = {name: value for name, value in vars(self).items() if name not in _NEVER_STORED}
        return copy.deepcopy({"algorithm": self.algorithm, **fields})

    def __iter__(self):
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_dict() == self.to_dict()

    __hash__ = None

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`: transformers asks a config that is passed as `config=` so."""
        return getattr(self, name, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller may change of a stored config when loading."""
        return {"runtime": self.runtime, "kernel": self.kernel}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config that a dict describes; its "algorithm" picks the class.

        Raises:
            ValueError: an unknown algorithm, or see the class.
        """
        fields = {**config_dict, **kwargs}
        name = fields.pop("algorithm", cls.algorithm)
        if name not in ALGORITHMS:
            raise ValueError(
                f"algorithm={name!r} is unknown to this optimum-zsaq, which has {sorted(ALGORITHMS)}; "
                "use one of them, or run `pip install --upgrade optimum-zsaq`"
            )
        config = ALGORITHMS[name](**fields)
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, path: str | Path) -> "LowBitConfig":
        """The config that a JSON file describes."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


ALGORITHMS[LowBitConfig.algorithm] = LowBitConfig


def body_name(model: nn.Module, name: str) -> str:
    """A module's name as checkpoints write it: without the prefix of the pre-trained body."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def _list_of_names(names: Any) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"modules_to_not_convert={names!r} is not what is needed; use a list of strings, such as ['pooler']"
        )
    return list(names)


class _TableError(ValueError):
    """A row of the table of modules says nothing that can be read."""


def _row(fields: dict[str, Any] | None) -> LayerSpec | None:
    if fields is None:
        return None
    inputs = fields.get("inputs")
    try:
        outliers = {name: fields[name] for name in ("outliers", "outlier_scope") if name in fields}
        return LayerSpec(QuantSpec(**fields["weight"]), inputs and QuantSpec(**inputs), **outliers)
    except ValueError as error:
        raise _TableError(str(error)) from error


def _most_common(rows: list[LayerSpec]) -> LayerSpec | None:
    return Counter(rows).most_common(1)[0][0] if rows else None


def _float_layers(model: nn.Module, facts: ModelFacts) -> list[str]:
    """The Linear layers and tables that are float, whether they could be low-bit or not."""
    low_bit = {name for name, _ in low_bit_layers(model)}
    layers = (name for name, m in model.named_modules() if kind_of(m) is not None or isinstance(m, nn.Embedding))
    return [name for name in layers if name not in low_bit]
