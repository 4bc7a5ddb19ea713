"""Training while a model loads: what comes out, what is refused."""

import re

import pytest
import torch
from tiny_models import logits, make, make_tokenizer

from optimum_zsaq import LowBitConfig, PreQuantConfig, ZSAQConfig
from optimum_zsaq.integrations.configs import ALGORITHMS
from optimum_zsaq.integrations.zsaq import _generator
from optimum_zsaq.layers import FakeQuantLinear, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


SHORT = {"steps": 6, "batch_size": 4, "sequence_length": 12, "ranges": "minmax", "embedding_bits": 4}


def load(name: str, folder, seed: int = 0, dtype=None, **settings):
    model = make(name)
    model.to(dtype or torch.float32).save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=ZSAQConfig(**{**SHORT, "seed": seed, **settings}))


@pytest.mark.parametrize(
    "name", ["bert", "bert-cls", "roberta-mlm-tied", "gpt2-tied", "llama-tied", "t5-tied", "bart-tied"]
)
class TestEveryFamily:
    def test_gives_a_packed_model_that_reloads_as_it_is(self, name, tmp_path):
        model = load(name, tmp_path / "float", generator_every=3, rho=0.05)
        model.save_pretrained(tmp_path / "packed")
        again = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(logits(model), logits(again))
        assert isinstance(again.config.quantization_config, ZSAQConfig)
        assert any(isinstance(layer, PackedLinear) for _, layer in low_bit_layers(model))
        assert not any(p.grad is not None for p in model.parameters())

    def test_is_not_rounding(self, name, tmp_path):
        trained = load(name, tmp_path, weight_bits=2, learning_rate=1e-3)
        rounded = type(trained).from_pretrained(
            tmp_path, quantization_config=PreQuantConfig(weight_bits=2, embedding_bits=4, ranges="minmax")
        )
        codes = [dict(low_bit_layers(model)) for model in (trained, rounded)]
        assert codes[0].keys() == codes[1].keys()
        changed = [
            n for n, m in codes[0].items() if m.owner is m and not torch.equal(m.weight_codes, codes[1][n].weight_codes)
        ]
        assert len(changed) > 2
        assert not torch.equal(logits(trained), logits(rounded))


class TestTheResult:
    def test_a_seed_decides_it(self, tmp_path):
        first, second, other = (load("bert-cls", tmp_path, seed=seed, generator_every=2) for seed in (1, 1, 2))
        assert torch.equal(logits(first), logits(second))
        assert not torch.equal(logits(first), logits(other))

    def test_leaves_the_global_random_numbers_alone(self, tmp_path):
        make("bert-cls").save_pretrained(tmp_path)
        cls, config = type(make("bert-cls")), ZSAQConfig(**SHORT)
        before = torch.get_rng_state()
        cls.from_pretrained(tmp_path, quantization_config=config)
        assert torch.equal(torch.get_rng_state(), before)

    def test_fake_quantized_on_demand(self, tmp_path):
        model = load("bert-cls", tmp_path, packed=False)
        assert any(isinstance(layer, FakeQuantLinear) for _, layer in low_bit_layers(model))
        assert model.hf_quantizer.is_qat_trainable

    def test_keeps_the_dtype_of_what_stays_float(self, tmp_path):
        model = load("bert-cls", tmp_path, dtype=torch.bfloat16)
        assert model.dtype == model.classifier.weight.dtype == torch.bfloat16
        assert all(layer.weight_scale.dtype == torch.float32 for _, layer in low_bit_layers(model))
        assert logits(model).isfinite().all()

    def test_static_inputs(self, tmp_path):
        model = load("bert-cls", tmp_path, activations="static")
        scales = [layer.input_scale for _, layer in low_bit_layers(model) if layer.spec.inputs is not None]
        assert scales
        assert all(scale.isfinite().all() for scale in scales)

    def test_special_tokens_of_a_tokenizer_are_used(self, tmp_path):
        make_tokenizer().save_pretrained(tmp_path)
        model = make("bert-cls")
        model.config.name_or_path = str(tmp_path)
        batch = _generator(model, ZSAQConfig(**SHORT)).sample(9)
        lengths = batch["attention_mask"].sum(dim=1)
        assert (batch["input_ids"][:, 0] == 1).all()
        assert (batch["input_ids"][torch.arange(9), lengths - 1] == 2).all()
        assert (batch["input_ids"][:, 1:3] > 4).all()

    def test_the_recipe_says_how_it_was_made(self, tmp_path):
        model = load("bert-cls", tmp_path, weight_bits=2, steps=20, learning_rate=1e-3)
        recipe = model.config.quantization_config.recipe
        data = recipe["calibration"]
        assert (data["kind"], data["count"], data["seed"]) == ("generated token sequences", 80, 0)
        assert data["first_loss"] > 0.0
        assert data["last_loss"] > 0.0

    def test_the_users_config_is_left_as_it_was(self, tmp_path):
        make("bert-cls").save_pretrained(tmp_path)
        config = ZSAQConfig(**SHORT)
        before = config.to_dict()
        type(make("bert-cls")).from_pretrained(tmp_path, quantization_config=config)
        assert config.to_dict() == before

    def test_trains_under_no_grad_of_the_caller(self, tmp_path):
        expected = logits(load("bert-cls", tmp_path))
        with torch.no_grad():
            found = logits(load("bert-cls", tmp_path))
        assert torch.equal(found, expected)


class TestOutputs:
    def test_count_if_asked(self, tmp_path):
        with_outputs = load("bert-cls", tmp_path, output_weight=1.0)
        assert not torch.equal(logits(with_outputs), logits(load("bert-cls", tmp_path)))

    def test_of_a_regression_are_compared_by_their_squared_error(self, tmp_path):
        """The KL divergence of one output is always zero, and nothing would be learned."""
        make("bert-cls", num_labels=1).save_pretrained(tmp_path)
        cls, settings = type(make("bert-cls")), {**SHORT, "hidden_weight": 0.0, "output_weight": 1.0}
        model = cls.from_pretrained(tmp_path, quantization_config=ZSAQConfig(**settings))
        assert model.config.quantization_config.recipe["calibration"]["first_loss"] > 0.0

    def test_of_a_model_without_any(self, tmp_path):
        with pytest.raises(ValueError, match="output_weight=1.0 needs a model that returns logits"):
            load("bert", tmp_path, output_weight=1.0)


class TestConfig:
    def test_survives_json(self):
        config = ZSAQConfig(weight_bits=2, steps=7, rho=0.1, generator_every=3)
        again = LowBitConfig.from_dict(config.to_dict())
        assert type(again) is ZSAQConfig
        assert again == config
        assert ALGORITHMS["zsaq"] is ZSAQConfig

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rho": -0.1}, "rho=-0.1 is no radius"),
            ({"steps": 0}, "steps=0 is no count"),
            ({"sequence_length": 4}, "sequence_length=4 is too short; use an integer of at least 5"),
            ({"stepps": 3}, r"ZSAQConfig has no field 'stepps'; did you mean 'steps'\?"),
            ({"weight_bits": 9}, "weight_bits=9 is not a width we have codes for"),
            ({"perturb": "codes"}, "perturb='codes' is unknown"),
        ],
        ids=lambda v: str(v)[:24],
    )
    def test_bad_values(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ZSAQConfig(**fields)


def test_an_untrained_head_is_refused(tmp_path):
    make("bert").save_pretrained(tmp_path)
    message = re.escape("fine-tune the float model first, or load it without that head (AutoModel)")
    with pytest.raises(ValueError, match=message):
        type(make("bert-cls")).from_pretrained(tmp_path, quantization_config=ZSAQConfig(**SHORT))
