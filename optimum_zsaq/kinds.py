"""Which layer types can be quantized, and what must be known of a model beyond its modules: two registries.

Linear and Embedding are known here; `integrations/` registers the layer types of libraries, and a reader of their models
that tells which tables are read by token ids, which layers share a weight and which are heads. A plain `nn.Module` is read
by `ModelReader` itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layers import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    FakeQuantTransposedLinear,
    LowBitLayer,
    PackedEmbedding,
    PackedLinear,
    PackedTransposedLinear,
)


@dataclass(frozen=True)
class LayerKind:
    """A float layer type that can be quantized.

    Args:
        fake, packed (`type`): the layer types of the two other states.
        build (`Callable`): (low-bit layer, weight (O, I)) -> float layer, its weight a new Parameter.
        table (`bool`): read by token ids; False: computes a matmul.
    """

    fake: type
    packed: type
    build: Callable[[LowBitLayer, Tensor], nn.Module]
    table: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What `select` must know of a model; all names are those of `model.named_modules()`.

    Args:
        tables (`frozenset[str]`): the embeddings that are read by token ids.
        tied (`Mapping[str, str]`): layer -> the layer whose weight it shares.
        heads (`frozenset[str]`): layers outside the pre-trained body, which stay float.
    """

    tables: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()


class ModelReader:
    """Reads a plain module: every `nn.Embedding` is a table, equal Parameters are tied, nothing is a head."""

    def reads(self, model: nn.Module) -> bool:
        """Whether this reader knows models of this type."""
        return True

    def facts(self, model: nn.Module) -> ModelFacts:
        """What `select` must know of the model."""
        tables, tied, first = set(), {}, {}
        for name, module in model.named_modules():
            if type(module) not in KINDS and not isinstance(module, LowBitLayer):
                continue
            if isinstance(module, nn.Embedding):
                tables.add(name)
            owner = first.setdefault(id(module.weight), name)
            if owner != name:
                tied[name] = owner
        return ModelFacts(frozenset(tables), tied)

    def changed(self, model: nn.Module) -> None:
        """Called after `prepare`, `pack` or `unpack` changed the model."""


def _float_linear(layer: LowBitLayer, weight: Tensor) -> nn.Module:
    linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), layer.bias
    return linear


def _float_embedding(layer: LowBitLayer, weight: Tensor) -> nn.Module:
    return nn.Embedding(*weight.shape, padding_idx=layer.padding_idx, _weight=weight, _freeze=False)


KINDS: dict[type, LayerKind] = {
    nn.Linear: LayerKind(FakeQuantLinear, PackedLinear, _float_linear),
    nn.Embedding: LayerKind(FakeQuantEmbedding, PackedEmbedding, _float_embedding, table=True),
}
_READERS: list[ModelReader] = [ModelReader()]


def register_reader(reader: ModelReader) -> None:
    """Ask `reader` about a model before those registered earlier."""
    _READERS.insert(0, reader)


def register_transposed(float_type: type, build: Callable[[LowBitLayer, Tensor], nn.Module]) -> None:
    """Make a layer type quantizable that computes x @ W + b with W (I, O); `build` gets the weight as (O, I)."""
    KINDS[float_type] = LayerKind(FakeQuantTransposedLinear, PackedTransposedLinear, build)


def register_embedding(float_type: type) -> None:
    """Make an Embedding subclass quantizable that keeps its own forward, which must call `super().forward(ids)`."""
    if float_type in KINDS:
        return
    fake, packed = (
        type(base.__name__ + float_type.__name__, (float_type, base), {"__init__": base.__init__, "__module__": __name__})
        for base in (FakeQuantEmbedding, PackedEmbedding)
    )
    globals().update({fake.__name__: fake, packed.__name__: packed})  # so that pickle finds them

    def build(layer: LowBitLayer, weight: Tensor) -> nn.Module:
        table = float_type.__new__(float_type)
        nn.Embedding.__init__(table, *weight.shape, padding_idx=layer.padding_idx, _weight=weight, _freeze=False)
        return table

    KINDS[float_type] = LayerKind(fake, packed, build, table=True)


def reader_of(model: nn.Module) -> ModelReader:
    """The reader that knows this model."""
    return next(reader for reader in _READERS if reader.reads(model))


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer in whichever state, None if it cannot be quantized."""
    if isinstance(layer, LowBitLayer) and layer.float_type is not None:
        return KINDS[layer.float_type]
    kind = KINDS.get(type(layer))
    return kind or next((k for k in KINDS.values() if type(layer) in (k.fake, k.packed)), None)
