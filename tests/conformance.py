"""The rows that every layer test runs on, and checks that every low-bit layer and model must pass.

A new layer kind joins by one row in `LAYERS`, a new kind of scheme by one row in `SCHEMES`. Not here: what is special to
one kind (see `tests/layers/`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from tolerances import KERNEL, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_zsaq import kinds, surgery
from optimum_zsaq.layers import LowBitLayer
from optimum_zsaq.ops import find_input_range
from optimum_zsaq.spec import LayerSpec, QuantScheme, QuantSpec


BITS = range(2, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 5  # divides the 15 columns of SHAPES and none of the others, is longer than 3
SHAPES = ((2, 13), (3, 17), (2, 33), (7, 15), (1, 3), (5, 129))  # (rows, columns): a 2-row head, K off every power of 2

DYNAMIC = QuantSpec(8, "token", symmetric=False)
STATIC = QuantSpec(8, "tensor", symmetric=False)


class TransposedLinear(nn.Module):
    """x @ W + b with W (I, O), as GPT-2's layers store it."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows))
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def build_transposed(layer: LowBitLayer, weight: Tensor) -> TransposedLinear:
    """What `kinds.register_transposed` asks for."""
    new = TransposedLinear(layer.in_features, layer.out_features)
    new.weight, new.bias = nn.Parameter(weight.t().contiguous()), layer.bias
    return new


@dataclass(frozen=True)
class Kind:
    """A float layer type: `build` makes one from a weight (O, I), `inputs` what it is called with."""

    build: Callable[[Tensor], nn.Module]
    inputs: Callable[[int, int, torch.dtype, torch.Generator], Tensor]
    transposed: bool = False


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def _transposed(weight: Tensor) -> nn.Module:
    layer = TransposedLinear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.weight = nn.Parameter(weight.t().contiguous())
    return layer


def _embedding(weight: Tensor) -> nn.Module:
    return nn.Embedding(*weight.shape, _weight=weight, _freeze=False)


def _features(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, columns, generator=generator).to(dtype)


def _ids(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(rows, (2, 4), generator=generator)


LAYERS = {
    "linear": Kind(_linear, _features),
    "transposed": Kind(_transposed, _features, transposed=True),
    "embedding": Kind(_embedding, _ids),
}


def spec_id(spec: QuantSpec) -> str:
    """A readable test id: "w3-group5-asymmetric"."""
    form = "ternary" if spec.ternary else "symmetric" if spec.symmetric else "minimum" if spec.minimum else "asymmetric"
    return f"w{spec.bits}-{spec.granularity}{spec.group_size or ''}-{form}{'-half' if spec.scale_bits == 16 else ''}"


def weight_specs(bits: range | tuple[int, ...] = BITS, ternary: bool = True) -> list[QuantSpec]:
    """Every granularity, symmetric, with zero points and with minima, of some widths, and the ternary codes."""
    layouts = (("tensor", None), ("row", None), ("group", GROUP))
    specs = [QuantSpec(b, name, size, s) for b in bits for name, size in layouts for s in (True, False)]
    specs += [QuantSpec(b, "group", GROUP, False, minimum=True, scale_bits=16) for b in bits]
    specs += [QuantSpec(b, "row", None, False, minimum=True) for b in bits[-1:]]
    specs += [QuantSpec(b, "group", GROUP, scale_bits=16) for b in bits[:1]]
    return specs + [QuantSpec(2, name, size, ternary=True) for name, size in layouts if ternary]


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight (rows, columns): normal, of a random magnitude; some are one-sided, heavy-tailed or have a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** (4 * torch.rand(1, generator=generator) - 3)
    if seed % 5 == 1:
        weight = weight.abs()
    if seed % 5 == 2:
        weight = weight * torch.randn(rows, columns, generator=generator).abs()
    if seed % 5 == 3:
        weight[0] = 0
    return weight.to(dtype)


def fake_and_packed(layer: nn.Module, spec: LayerSpec, x: Tensor, ranges: str) -> tuple[LowBitLayer, LowBitLayer]:
    """A float layer in its two low-bit states, static inputs calibrated on x."""
    kind = kinds.kind_of(layer)
    fake = kind.fake.from_float(layer, spec)
    fake.find_ranges(surgery.range_method(spec, ranges))
    packed = kind.packed.skeleton(fake, spec)
    packed.set_weight(fake)
    if spec.inputs is not None and spec.inputs.granularity == "tensor":
        values = x.float().flatten()
        scale, zero_point = find_input_range(values, values.min().item(), values.max().item(), spec.inputs, "minmax")
        fake.set_input_range(scale, zero_point)
        packed.set_input_range(fake.input_scale, fake.input_zero_point)
    return fake, packed


def check_packed_equals_fake(name: str, spec: LayerSpec, *dtypes: torch.dtype, seeds: int = 100) -> None:
    """The packed layer computes exactly what the fake-quantized one does, on many weights and shapes.

    `torch.equal` on the reference kernel; on the one that is chosen, but for the order of sums and a rounding.
    Shapes, range methods, runtimes and, where several are given, dtypes take turns.
    """
    kind = LAYERS[name]
    for seed in range(seeds):
        dtype = dtypes[seed % len(dtypes)]
        rows, columns = SHAPES[seed // len(dtypes) % len(SHAPES)]
        layer = kind.build(random_weight(rows, columns, seed, dtype))
        x = kind.inputs(rows, columns, dtype, torch.Generator().manual_seed(seed))
        fake, packed = fake_and_packed(layer, spec, x, ("minmax", "lsq")[seed % 2])
        with torch.no_grad():
            packed.set_runtime(runtime := ("fast", "small")[seed // 2 % 2])
            expected, chosen, found = fake(x), packed(x), exactly(packed)(x)
            assert found.dtype == chosen.dtype == expected.dtype == dtype, seed
            assert torch.equal(found, expected), f"seed {seed}: differs by {(found - expected).abs().max()}"
            assert relative_error(chosen, expected) <= KERNEL[dtype], (seed, runtime)


def exactly(model: nn.Module) -> nn.Module:
    """A packed model or layer on the kernel that computes what fake-quantized layers do, bit for bit; in place."""
    return surgery.set_runtime(model, "fast", kernel="reference")


class ToyModel(nn.Module):
    """A table, a Linear, a transposed Linear, an output embedding (tied to the table or not) and a head of two rows."""

    VOCABULARY, WIDTH, INNER = 11, 13, 33

    def __init__(self, tied: bool = True):
        super().__init__()
        self.table = nn.Embedding(self.VOCABULARY, self.WIDTH, padding_idx=0)
        self.up = nn.Linear(self.WIDTH, self.INNER)
        self.norm = nn.LayerNorm(self.INNER)
        self.down = TransposedLinear(self.INNER, self.WIDTH)
        self.output = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)
        self.head = nn.Linear(self.WIDTH, 2)
        if tied:
            self.output.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        x = x + self.down(nn.functional.relu(self.norm(self.up(x))))
        return self.output(x), self.head(x)


@dataclass(frozen=True)
class Row:
    """One way to quantize a model."""

    scheme: QuantScheme
    ranges: str = "minmax"


SCHEMES = {
    "w4a8e4-row": Row(QuantScheme(QuantSpec(4), QuantSpec(4), DYNAMIC), "mse"),
    "w8a8e8-tensor": Row(QuantScheme(QuantSpec(8, "tensor"), QuantSpec(8, "tensor"), DYNAMIC)),
    "w3a8e5-group-static": Row(
        QuantScheme(QuantSpec(3, "group", GROUP, symmetric=False), QuantSpec(5, "group", 4, symmetric=False), STATIC)
    ),
    "w2-ternary": Row(QuantScheme(QuantSpec(2, ternary=True), QuantSpec(4), DYNAMIC), "ternary"),
    "w2e2-ternary-tensor": Row(
        QuantScheme(QuantSpec(2, "tensor", ternary=True), QuantSpec(2, "tensor", ternary=True)), "ternary"
    ),
    "w3a4e6-outliers": Row(
        QuantScheme(QuantSpec(3), QuantSpec(6, symmetric=False), QuantSpec(4, "token", symmetric=False), (), outliers=0.05)
    ),
    "w4e8-minimum": Row(
        QuantScheme(
            QuantSpec(4, "group", 4, False, minimum=True, scale_bits=16), QuantSpec(8, "group", 4, scale_bits=16), DYNAMIC
        ),
        "mse",
    ),
    "w7-skips": Row(QuantScheme(QuantSpec(7, symmetric=False), skip=("head",)), "lsq"),
}


def toy_inputs(seed: int = 0) -> Tensor:
    """Token ids for `ToyModel`."""
    return torch.randint(ToyModel.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(seed))


def toy_prepared(row: Row, tied: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A fake-quantized `ToyModel`; static input ranges are set to what one batch shows."""
    torch.manual_seed(seed)
    model = surgery.prepare(ToyModel(tied).to(dtype).eval(), row.scheme, row.ranges)
    for _, layer in surgery.low_bit_layers(model):
        if layer.input_scale is not None:
            layer.set_input_range(torch.tensor([[0.03]]), torch.tensor([[100]], dtype=torch.uint8))
    return model


@torch.no_grad()
def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """All outputs of a `ToyModel`, as one tensor."""
    return torch.cat(model(ids), dim=-1)


def reload(model: nn.Module, empty: nn.Module, packed: bool = True) -> nn.Module:
    """Save a low-bit model as safetensors and load the bytes into a skeleton made of the float model `empty`."""
    table = {name: layer.spec for name, layer in surgery.low_bit_layers(model)}
    skeleton = surgery.skeleton(empty, table, packed)
    skeleton.load_state_dict(load(save(unshared(model.state_dict()))), assign=True)
    return skeleton.eval()


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory: the master weights of tied fake-quantized layers do."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """What a model keeps in memory, each storage once."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            yield tensor


class Sizes(TorchDispatchMode):
    """Bytes of every tensor that an operator makes, in `made`; views and what is written in place count nothing."""

    def __init__(self):
        super().__init__()
        self.made = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is_strided(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_strided(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(tensor.untyped_storage().nbytes())
        return result


def _is_strided(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_mkldnn


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits (a static range is NaN until it is calibrated)."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name
