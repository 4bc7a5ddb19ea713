"""Compensated rounding against a slow one, least squares and plain rounding; whole models, and what stays as it was."""

import copy

import pytest
import torch
from conformance import LAYERS, assert_same_state
from tiny_models import VOCABULARY, make
from tolerances import relative_error
from torch import Tensor, nn

from optimum_zsaq import kinds
from optimum_zsaq.algorithms.compensation import CompensationSettings, compensate, compensate_layer
from optimum_zsaq.algorithms.replay import linear_layers
from optimum_zsaq.integrations.data import uncached_batch
from optimum_zsaq.integrations.models import register_models
from optimum_zsaq.layers import FakeQuantTransposedLinear, LowBitLayer
from optimum_zsaq.ops import fake_quantize_tokens, quantize
from optimum_zsaq.spec import LayerSpec, QuantScheme, QuantSpec
from optimum_zsaq.surgery import low_bit_layers, prepare


ROWS, COLUMNS, TOKENS = 7, 33, 400
FULL = CompensationSettings(alpha=1.0)
DYNAMIC4 = QuantSpec(4, "token", symmetric=False)


@pytest.fixture(autouse=True)
def known_models(toy_kinds):
    register_models()


def low_bit(weight: Tensor, spec: LayerSpec, kind: str = "linear") -> LowBitLayer:
    layer = LAYERS[kind].build(weight.clone())
    layer = kinds.kind_of(layer).fake.from_float(layer, spec)
    layer.find_ranges("minmax")
    return layer


def correlated(tokens: int = TOKENS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Inputs that share a few directions, as those of real layers do, of columns of different sizes."""
    random = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 6, generator=random) @ torch.randn(6, columns, generator=random)
    noise = torch.randn(tokens, columns, generator=random) * (0.1 + torch.rand(columns, generator=random))
    return few + noise


def moments(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return found.t() @ found / len(found), (wanted - found).t() @ found / len(found)


def slices(layer: LowBitLayer, per_slice: Tensor) -> Tensor:
    """One value a slice -> one a weight, spelled out."""
    rows, columns = layer.shape
    found = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            row = 0 if per_slice.shape[0] == 1 else i
            column = j // layer.spec.weight.group_size if layer.spec.weight.group_size else 0
            found[i, j] = per_slice[row, column]
    return found


def slow(layer: LowBitLayer, own: Tensor, change: Tensor, settings: CompensationSettings) -> tuple[Tensor, Tensor]:
    """OBQ's update of all weights after each column, in float64: the inverse shrinks by Gaussian elimination.

    Returns the levels (codes without their offset) and what they stand for.
    """
    spec, weight = layer.spec.weight, layer.master().detach().double().clone()
    own, change = own.double(), change.double()
    scale = slices(layer, layer.weight_scale)
    shift = torch.zeros_like(scale) if spec.symmetric else slices(layer, layer.weight_shift)
    low, zero = (shift, torch.zeros_like(scale)) if spec.minimum else (torch.zeros_like(scale), shift)
    lowest, highest = (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
    residual = torch.zeros_like(weight)
    if layer.weight_outlier_positions is not None:
        for position, value in zip(layer.weight_outlier_positions.tolist(), layer.weight_outlier_values, strict=True):
            residual[position // layer.shape[1], position % layer.shape[1]] = value
    damped = own + torch.eye(len(own)) * (settings.damping * own.diagonal().mean() + 1e-8)
    inverse = damped.inverse()
    weight += settings.alpha * weight @ change @ inverse
    levels = torch.empty_like(weight)
    for j in own.diagonal().argsort(descending=True).tolist():
        codes = (torch.round((weight[:, j] - low[:, j]) / scale[:, j]) + zero[:, j]).clamp(lowest, highest)
        levels[:, j] = codes - zero[:, j]
        error = weight[:, j] - levels[:, j] * scale[:, j] - low[:, j] - residual[:, j]
        weight -= torch.outer(error / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # its row and column are zero now
    return levels, levels * scale + low + residual


def levels_of(layer: LowBitLayer) -> Tensor:
    spec = layer.spec.weight
    codes = quantize(layer.master(), layer.weight_scale, layer.weight_shift, spec).double()
    return codes - (spec.offset if spec.symmetric else 0 if spec.minimum else slices(layer, layer.weight_shift))


LAYOUTS = {"tensor": ("tensor", None), "row": ("row", None), "group": ("group", 8)}
FORMS = {"symmetric": {}, "asymmetric": {"symmetric": False}}
FORMS["minimum"] = {"symmetric": False, "minimum": True, "scale_bits": 16}


class TestOneLayer:
    @pytest.mark.parametrize("outliers", [0.0, 0.03], ids=["", "outliers"])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("bits", [2, 4])
    def test_codes_are_those_of_the_slow_algorithm(self, bits, layout, form, outliers):
        spec = LayerSpec(QuantSpec(bits, *LAYOUTS[layout], **FORMS[form]), outliers=outliers)
        wanted = correlated()
        given = moments(wanted + 0.1 * torch.randn_like(wanted), wanted)
        for block in (128, 5, 1):
            layer = low_bit(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits)), spec)
            settings = CompensationSettings(alpha=0.5, block=block)
            levels, values = slow(layer, *given, settings)
            assert not torch.equal(levels_of(layer), levels)
            compensate_layer(layer, *given, settings)
            assert torch.equal(levels_of(layer), levels)
            assert torch.allclose(layer.quantized_weight().double(), values, rtol=1e-6, atol=1e-6)

    def test_ranges_for_what_the_layer_reads(self):
        """Found on the corrected weight, with the energies of these inputs; then as if they had been there before."""
        weight, x = torch.randn(ROWS, COLUMNS), correlated() * torch.where(torch.arange(COLUMNS) % 5 == 0, 20.0, 1.0)
        given, spec = moments(x, x), LayerSpec(QuantSpec(2, "group", 8, **FORMS["minimum"]))
        found, expected = low_bit(weight, spec), low_bit(weight, spec)
        compensate_layer(found, *given, CompensationSettings(ranges="energy", rounds=0))
        expected.find_ranges("energy", given[0].diagonal())
        assert not torch.equal(expected.weight_scale, low_bit(weight, spec).weight_scale)
        compensate_layer(expected, *given, CompensationSettings())
        assert torch.equal(found.weight_scale, expected.weight_scale)
        assert torch.equal(found.quantized_weight(), expected.quantized_weight())

    def test_a_layer_that_stores_its_weight_transposed(self):
        weight, x = torch.randn(ROWS, COLUMNS), correlated()
        given = moments(x, x)
        plain, turned = (low_bit(weight, LayerSpec(QuantSpec(3)), kind) for kind in ("linear", "transposed"))
        assert isinstance(turned, FakeQuantTransposedLinear)
        for layer in (plain, turned):
            compensate_layer(layer, *given, CompensationSettings())
        assert turned.weight.shape == (COLUMNS, ROWS)
        assert torch.equal(turned.weight.t(), plain.weight)
        assert not torch.equal(plain.weight, weight)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_the_error_of_the_output_is_far_below_that_of_rounding(self, bits):
        weight, x = torch.randn(ROWS, COLUMNS), correlated()
        layer = low_bit(weight, LayerSpec(QuantSpec(bits)))
        rounded = relative_error(x @ layer.quantized_weight().t(), x @ weight.t())
        compensate_layer(layer, *moments(x, x), CompensationSettings())
        assert relative_error(x @ layer.quantized_weight().t(), x @ weight.t()) < 0.5 * rounded

    @pytest.mark.parametrize("outliers", [0.0, 0.03], ids=["", "outliers"])
    def test_without_correlation_it_is_rounding(self, outliers):
        weight = torch.randn(ROWS, COLUMNS)
        layer = low_bit(weight, LayerSpec(QuantSpec(2), outliers=outliers))
        compensate_layer(layer, torch.eye(COLUMNS), torch.randn(COLUMNS, COLUMNS), CompensationSettings(alpha=0.0))
        assert torch.equal(layer.weight, weight)

    def test_a_share_of_the_correction(self):
        """Of no change, alpha is no matter; of one, the weights move by it."""
        weight, x = torch.randn(ROWS, COLUMNS), correlated()
        spec, y = LayerSpec(QuantSpec(8)), x + 0.2 * torch.randn_like(x)
        found = {}
        for alpha in (0.0, 0.5, 1.0):
            same, changed = low_bit(weight, spec), low_bit(weight, spec)
            compensate_layer(same, *moments(x, x), CompensationSettings(alpha))
            compensate_layer(changed, *moments(y, x), CompensationSettings(alpha))
            found[alpha] = same.weight, (y @ changed.weight.t() - x @ weight.t()).norm().item()
        assert torch.equal(found[0.0][0], found[1.0][0])
        assert found[1.0][1] < found[0.5][1] < found[0.0][1]

    def test_the_whole_correction_is_least_squares(self):
        """With 8 bits hardly anything is rounded: what is left is the regression of W X_float on X."""
        weight, wanted = torch.randn(ROWS, COLUMNS), correlated()
        found = wanted @ (torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS)) + 0.2 * torch.randn(TOKENS, COLUMNS)
        layer = low_bit(weight, LayerSpec(QuantSpec(8)))
        with torch.no_grad():
            layer.weight_scale.mul_(2)  # room for larger weights
        best = torch.linalg.lstsq(found.double(), (wanted @ weight.t()).double()).solution.t()
        settings = CompensationSettings(alpha=1.0, damping=1e-7)
        target = (wanted @ weight.t()).double()
        rounded = (found @ layer.quantized_weight().t()).sub(target).norm()
        compensate_layer(layer, *moments(found, wanted), settings)
        least = (found.double() @ best.t() - target).norm()
        compensated = (found @ layer.quantized_weight().t()).sub(target).norm()
        assert least <= compensated < 1.02 * least
        assert rounded > 2 * least
        assert (layer.weight - best).abs().max() < 5 * layer.weight_scale.max()

    def test_inputs_that_are_always_zero(self):
        """A dead column, as of a ReLU, has no correlation and is rounded as it is; a dead input leaves all as it is."""
        weight, x = torch.randn(ROWS, COLUMNS), correlated()
        x[:, 4] = 0
        layer = low_bit(weight, LayerSpec(QuantSpec(3)))
        compensate_layer(layer, *moments(x, x), CompensationSettings())
        assert torch.equal(layer.weight[:, 4], weight[:, 4])
        assert torch.isfinite(layer.weight).all()
        layer = low_bit(weight, LayerSpec(QuantSpec(3)))
        compensate_layer(layer, torch.zeros(COLUMNS, COLUMNS), torch.zeros(COLUMNS, COLUMNS), FULL)
        assert torch.equal(layer.weight, weight)

    def test_fewer_tokens_than_columns(self):
        weight, x = torch.randn(ROWS, COLUMNS), correlated(tokens=3)
        layer = low_bit(weight, LayerSpec(QuantSpec(3)))
        rounded = relative_error(x @ layer.quantized_weight().t(), x @ weight.t())
        compensate_layer(layer, *moments(x, x), FULL)
        assert relative_error(x @ layer.quantized_weight().t(), x @ weight.t()) < 0.1 * rounded

    def test_only_the_weight_changes(self):
        spec = LayerSpec(QuantSpec(3, symmetric=False), DYNAMIC4, outliers=0.03)
        layer, x = low_bit(torch.randn(ROWS, COLUMNS), spec), correlated()
        before, parameter = copy.deepcopy(layer.state_dict()), layer.weight
        compensate_layer(layer, *moments(x, x), FULL)
        changed = {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {"weight"}
        assert layer.weight is parameter


def pair(name: str, scheme: QuantScheme, **options) -> tuple[nn.Module, nn.Module]:
    """A float model and its rounded copy."""
    return make(name, **options), prepare(make(name, **options), scheme, "minmax")


def batches(model: nn.Module, count: int = 3, rows: int = 8, length: int = 16, seed: int = 3) -> list[dict]:
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, VOCABULARY, (rows, length), generator=random) for _ in range(count)]
    return [uncached_batch(model, {"input_ids": one, "attention_mask": torch.ones_like(one)}) for one in ids]


@torch.no_grad()
def distance(teacher: nn.Module, student: nn.Module, data: list[dict]) -> float:
    """Mean relative error of all hidden states, a decoder's too."""
    errors = []
    for batch in data:
        states = []
        for model in (teacher, student):
            output = model(**batch, output_hidden_states=True)
            names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
            states.append([h for n in names for h in (getattr(output, n, None) or ())[1:]])
        errors += [relative_error(b, a) for a, b in zip(*states, strict=True)]
    return sum(errors) / len(errors)


MODELS = {"bert-cls": 2, "deberta-cls": 3, "gpt2-tied": 3, "opt-tied": 3, "llama-tied": 2, "t5-tied": 3, "bart-tied": 3}


class TestWholeModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_hidden_states_are_nearer_than_after_rounding(self, name):
        scheme = QuantScheme(QuantSpec(MODELS[name]), QuantSpec(8))
        teacher, student = pair(name, scheme)
        data, before = batches(teacher), copy.deepcopy(teacher.state_dict())
        own = copy.deepcopy(student.state_dict())
        rounded = distance(teacher, student, data)
        assert compensate(teacher, student, data) is student
        assert distance(teacher, student, data) < 0.95 * rounded
        assert_same_state(teacher.state_dict(), before)
        moved = {n for n, t in student.state_dict().items() if not torch.equal(t, own[n])}
        assert moved == {f"{n}.weight" for n in linear_layers(student)}
        for model in (teacher, student):
            assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())

    def test_is_reproducible(self):
        found = []
        for _ in range(2):
            teacher, student = pair("llama-tied", QuantScheme(QuantSpec(2)))
            found.append(compensate(teacher, student, batches(teacher)).state_dict())
        assert_same_state(*found)

    def test_random_state_and_gradients_are_left_alone(self):
        teacher, student = pair("bert-cls", QuantScheme(QuantSpec(3)))
        flags = [p.requires_grad for p in student.parameters()]
        before = torch.get_rng_state()
        compensate(teacher, student, batches(teacher))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in student.parameters())
        assert [p.requires_grad for p in student.parameters()] == flags

    def test_progress(self):
        teacher, student = pair("bert-cls", QuantScheme(QuantSpec(3)))
        told = []
        compensate(teacher, student, batches(teacher), watch=lambda unit, done: told.append((unit, done)))
        blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        assert told == [(blocks[0], 0.0), (blocks[1], pytest.approx(1 / 3)), ("bert.pooler.dense", pytest.approx(2 / 3))]

    def test_a_layer_that_runs_again_in_its_block(self):
        """DeBERTa-v3's queries and keys are also those of its positions."""
        teacher, student = pair("deberta-cls", QuantScheme(QuantSpec(3)), share_att_key=True)
        own = copy.deepcopy(student.state_dict())
        compensate(teacher, student, batches(teacher))
        moved = {n for n, t in student.state_dict().items() if not torch.equal(t, own[n])}
        assert moved == {f"{n}.weight" for n in linear_layers(student)}

    def test_settings_count(self):
        found = []
        for settings in (None, CompensationSettings(), CompensationSettings(alpha=1.0), CompensationSettings(damping=1.0)):
            teacher, student = pair("bert-cls", QuantScheme(QuantSpec(3)))
            found.append(compensate(teacher, student, batches(teacher), settings).bert.pooler.dense.weight)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert not torch.equal(found[0], found[3])


def padded(data: list[dict], more: int, seed: int = 5) -> list[dict]:
    """The same sequences with junk behind them that the masks hide."""
    random, found = torch.Generator().manual_seed(seed), []
    for batch in data:
        longer = {}
        for name, t in batch.items():
            if isinstance(t, torch.Tensor):
                size = (len(t), more)
                junk = torch.zeros(size).long() if "mask" in name else torch.randint(5, VOCABULARY, size, generator=random)
                t = torch.cat([t, junk], dim=1)
            longer[name] = t
        found.append(longer)
    return found


class TestMasks:
    def results(self, name: str, change) -> list[dict[str, Tensor]]:
        found = []
        for altered in (False, True):
            teacher, student = pair(name, QuantScheme(QuantSpec(4)), **({"num_layers": 1} if name == "t5-tied" else {}))
            data = batches(teacher)
            if "decoder_input_ids" in data[0]:
                for batch in data:
                    batch["decoder_input_ids"] = batch["decoder_input_ids"].flip(1)
                    batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
            compensate(teacher, student, change(data) if altered else data)
            found.append({n: m.quantized_weight().detach() for n, m in linear_layers(student).items()})
        return found

    @pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
    def test_padding_does_not_count(self, name):
        expected, found = self.results(name, lambda data: padded(data, 5))
        for layer, weight in expected.items():
            if "pooler" not in layer:  # it has no mask, and no padding
                same = (found[layer] - weight).abs() < 1e-4
                assert same.float().mean() > 0.995, layer  # a code at a tie may fall the other way

    def test_padding_counts_where_no_mask_hides_it(self):
        expected, found = self.results(
            "bert-cls", lambda data: [{"input_ids": batch["input_ids"]} for batch in padded(data, 5)]
        )
        name = "bert.encoder.layer.0.attention.self.query"
        assert ((found[name] - expected[name]).abs() > 1e-4).float().mean() > 0.01

    def test_a_decoder_has_its_own_mask(self):
        """Answers end before the longest does: what is behind their end is not theirs."""

        def longer_answers(data):
            longer = padded(data, 5)
            return [{**batch, **{n: t for n, t in new.items() if "decoder" in n}} for batch, new in zip(data, longer)]  # noqa: B905

        expected, found = self.results("t5-tied", longer_answers)
        for layer, weight in expected.items():
            assert ((found[layer] - weight).abs() < 1e-4).float().mean() > 0.995, layer

    def test_a_batch_without_any_token(self):
        teacher, student = pair("bert-cls", QuantScheme(QuantSpec(3)))
        data = batches(teacher)
        hidden = {**data[0], "attention_mask": torch.zeros_like(data[0]["attention_mask"])}
        compensate(teacher, student, [hidden, hidden])
        assert all(torch.isfinite(m.weight).all() for m in linear_layers(student).values())


class Shared(nn.Module):
    """A block whose first layer reads the tokens, as the second does, and then a table of positions."""

    def __init__(self):
        super().__init__()
        self.both, self.tokens = nn.Linear(13, 5), nn.Linear(13, 5)
        self.positions = nn.Parameter(torch.randn(7, 13))

    def forward(self, x):
        first, second = self.both(x), self.tokens(x)
        return first @ self.both(self.positions).t() + second.sum(dim=-1, keepdim=True)


class OneBlock(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x):
        return self.blocks[0](x)


class Net(nn.Module):
    """A lone layer, two that read the same input, and one that only some batches, or rows, reach."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(13, 17), nn.Linear(17, 5), nn.Linear(17, 5)
        self.rare = nn.Linear(5, 3)

    def forward(self, x, rare: str = "no"):
        h = torch.relu(self.first(x))
        y = self.left(h) + self.right(h)
        return y if rare == "no" else self.rare(y if rare == "yes" else y[y.sum(dim=-1) > y.mean()])


def nets(scheme: QuantScheme) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net().eval()
    return copy.deepcopy(model), prepare(model, scheme, "minmax")


class TestPlainModels:
    @pytest.mark.parametrize("inputs", [None, DYNAMIC4], ids=["float", "dynamic"])
    def test_each_layer_sees_the_low_bit_layers_before_it(self, inputs):
        """And its own quantized input."""
        x = torch.randn(90, 13)
        teacher, student = nets(QuantScheme(QuantSpec(3), activations=inputs))
        _, expected = nets(QuantScheme(QuantSpec(3), activations=inputs))
        data = [{"x": x[:40]}, {"x": x[40:]}]
        compensate(teacher, student, data)
        settings = CompensationSettings()
        with torch.no_grad():
            low = (lambda t: fake_quantize_tokens(t, DYNAMIC4)) if inputs else (lambda t: t)
            compensate_layer(expected.first, *moments(low(x), x), settings)
            h, wanted = torch.relu(expected.first(x)), torch.relu(teacher.first(x))
            for layer in (expected.left, expected.right):
                compensate_layer(layer, *moments(low(h), wanted), settings)
        for name in ("first", "left", "right"):
            found, right = getattr(student, name), getattr(expected, name)
            assert torch.allclose(found.weight, right.weight, rtol=1e-4, atol=1e-4), name
            assert torch.equal(levels_of(found), levels_of(right)), name

    def test_a_layer_that_reads_other_things_too(self):
        """It is compensated for all that it reads, and those that read the same tokens for these alone."""
        teacher = OneBlock(Shared())
        student = prepare(copy.deepcopy(teacher), QuantScheme(QuantSpec(3)), "minmax")
        expected, x = copy.deepcopy(student).blocks[0], torch.randn(60, 13)
        compensate(teacher, student, [{"x": x[:40]}, {"x": x[40:]}])
        positions = expected.positions.detach()
        every = torch.cat([x, positions, positions])  # the table is read once a batch
        compensate_layer(expected.both, *moments(every, every), CompensationSettings())
        compensate_layer(expected.tokens, *moments(x, x), CompensationSettings())
        for name in ("both", "tokens"):
            found, right = getattr(student.blocks[0], name), getattr(expected, name)
            assert torch.allclose(found.weight, right.weight, rtol=1e-4, atol=1e-4), name

    def test_a_layer_that_no_batch_reaches_is_left_as_it_was_rounded(self):
        teacher, student = nets(QuantScheme(QuantSpec(3)))
        compensate(teacher, student, [{"x": torch.randn(20, 13)}])
        assert torch.equal(student.rare.weight, teacher.rare.weight)
        assert not torch.equal(student.left.weight, teacher.left.weight)

    def test_a_lone_layer_that_some_batches_do_not_reach(self):
        teacher, student = nets(QuantScheme(QuantSpec(3)))
        data = [{"x": torch.randn(20, 13), "rare": rare} for rare in ("yes", "no")]
        with pytest.raises(ValueError, match="rare did not run for 1 of 2 batches"):
            compensate(teacher, student, data)

    def test_a_layer_that_sees_other_tokens_than_the_teachers(self):
        """As an expert whose router decides otherwise after rounding: nothing is known of what it should answer."""
        teacher, student = nets(QuantScheme(QuantSpec(2)))
        compensate(teacher, student, [{"x": torch.randn(50, 13), "rare": "rows"} for _ in range(3)])
        assert torch.equal(student.rare.weight, teacher.rare.weight)
        assert not torch.equal(student.left.weight, teacher.left.weight)


class TestErrors:
    def test_no_batch(self):
        teacher, student = pair("bert-cls", QuantScheme(QuantSpec(3)))
        with pytest.raises(ValueError, match="no batch to compensate errors on; give at least one"):
            compensate(teacher, student, [])

    def test_ternary_weights(self):
        scheme = QuantScheme(QuantSpec(2, ternary=True), QuantSpec(4))
        teacher, student = make("bert-cls"), prepare(make("bert-cls"), scheme, "ternary")
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=r"query is ternary, and its errors cannot be compensated; use ranges='mse'"):
            compensate(teacher, student, batches(teacher))
        assert_same_state(student.state_dict(), before)

    def test_units_that_run_twice(self):
        teacher, student = nets(QuantScheme(QuantSpec(3)))
        student.right = student.left
        with pytest.raises(ValueError, match=r"\['left'\] run more than once in a forward pass"):
            compensate(teacher, student, [{"x": torch.randn(20, 13)}])

    @pytest.mark.parametrize(
        ("setting", "value", "text"),
        [
            ("alpha", -0.1, "alpha=-0.1 is no share; use a number from 0 to 1"),
            ("alpha", 1.1, "alpha=1.1 is no share"),
            ("alpha", float("nan"), "alpha=nan is no share"),
            ("alpha", "all", "alpha='all' is no share"),
            ("alpha", None, "alpha=None is no share"),
            ("damping", 0.0, "damping=0.0 is not allowed; use a number above 0"),
            ("damping", -1, "damping=-1 is not allowed"),
            ("damping", float("inf"), "damping=inf is not allowed"),
            ("damping", float("nan"), "damping=nan is not allowed"),
            ("damping", "some", "damping='some' is not allowed"),
            ("block", 0, "block=0 is no count of columns; use at least 1"),
            ("rounds", -1, "rounds=-1 is no count; use 0 or more"),
            ("block", -128, "block=-128 is no count of columns"),
            ("block", 1.5, "block=1.5 is no count of columns"),
            ("ranges", "mse", "ranges=.mse. is not allowed; use .energy., or None"),
        ],
    )
    def test_settings(self, setting, value, text):
        with pytest.raises(ValueError, match=text):
            CompensationSettings(**{setting: value})

    @pytest.mark.parametrize("settings", [{"alpha": 0}, {"alpha": 1}, {"damping": 5}, {"block": 1}])
    def test_settings_at_their_limits(self, settings):
        CompensationSettings(**settings)


def test_tables_and_layers_tied_to_them_stay():
    teacher, student = pair("llama-tied", QuantScheme(QuantSpec(3), QuantSpec(3)))
    tables = {n: m.quantized_weight().clone() for n, m in low_bit_layers(student) if n not in linear_layers(student)}
    assert set(tables) == {"model.embed_tokens", "lm_head"}
    compensate(teacher, student, batches(teacher))
    assert all(torch.equal(student.get_submodule(n).quantized_weight(), t) for n, t in tables.items())
