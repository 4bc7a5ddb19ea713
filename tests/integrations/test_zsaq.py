"""Training while a model loads: what comes out, what is refused."""

import inspect
import re

import pytest
import torch
from tiny_models import logits, make, make_tokenizer

from optimum_zsaq import LowBitConfig, PreQuantConfig, ZSAQConfig
from optimum_zsaq.algorithms.generators import PriorSource
from optimum_zsaq.algorithms.minimax import Minimax
from optimum_zsaq.integrations.closing import won_lines
from optimum_zsaq.integrations.configs import ALGORITHMS
from optimum_zsaq.integrations.zero_shot import finish_training, make_generator, sized, start_run
from optimum_zsaq.layers import FakeQuantLinear, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


TRAINED, WRITTEN = ["rounded", "trained"], ["rounded", "compensated", "trained"]
SHORT = {"steps": 6, "batch_size": 4, "sequence_length": 12, "ranges": "minmax", "embedding_bits": 4}
SHORT |= {"written_sequences": 16, "start_sequences": 16, "autocast": "float32", "guard": False}


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


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-tied", "bart-tied", "t5-tied"])
class TestMemoryOfModelsThatWrite:
    """Blocks keep their inputs alone, and logits that nothing counts are not computed: with the same gradients."""

    @staticmethod
    def gradients(name, keep, **settings):
        model = make(name)
        run, _ = start_run(model, sized(ZSAQConfig(**SHORT, **settings), model))
        if not keep:
            finish_training(model, packed=False, dtypes={})
            run.options = {}
        blocks = [m for m in model.modules() if "forward" in vars(m)]
        assert bool(blocks) == keep
        run.step()
        return [p.grad for p in run.trained], run

    def test_the_gradients_are_the_same(self, name):
        hidden = {"output_weight": 0.0, "hidden_weight": 1.0}
        (found, run), (expected, _) = (self.gradients(name, keep, **hidden) for keep in (True, False))
        counted = [(one, other) for one, other in zip(found, expected, strict=True) if other is not None]
        assert len(counted) > 10
        assert all(torch.equal(one, other) for one, other in counted)
        kept = "logits_to_keep" in inspect.signature(run.student.forward).parameters
        assert run.options == ({"logits_to_keep": 1} if kept else {})

    def test_decoders_learn_their_outputs_gently(self, name):
        model = make(name)
        settings = sized(ZSAQConfig(**SHORT), model).settings()
        found = settings.output_weight, settings.hidden_weight, settings.scale_learning_rate
        assert found == ((0.0, 1.0, 3e-5) if model.config.is_encoder_decoder else (1.0, 0.0, 1e-6))
        asked = {"output_weight": 0.5, "hidden_weight": 2.0, "learning_rate": 1e-3, "scale_learning_rate": 1e-2}
        settings = sized(ZSAQConfig(**SHORT, **asked), model).settings()
        assert {field: getattr(settings, field) for field in asked} == asked

    def test_logits_that_count_are_computed(self, name):
        _, run = self.gradients(name, True, output_weight=1.0)
        assert run.options == {}

    def test_nothing_of_it_is_left(self, name, tmp_path):
        model = load(name, tmp_path)
        assert not any("forward" in vars(m) for m in model.modules())


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
        batch = make_generator(model, ZSAQConfig(**SHORT)).sample(9)
        assert (batch["input_ids"][:, 0] == 1).all()
        assert (batch["input_ids"][:, -1] == 2).all()
        assert set(batch["input_ids"][batch["input_ids"] <= 4].tolist()) == {1, 2}

    def test_the_recipe_says_how_it_was_made(self, tmp_path):
        model = load("bert-cls", tmp_path, weight_bits=2, steps=20, learning_rate=1e-3)
        recipe = model.config.quantization_config.recipe
        data = recipe["calibration"]
        assert (data["kind"], data["count"], data["seed"]) == ("generated token sequences", 80, 0)
        assert list(data["won"]) == ["rounded", "trained"]
        for found in data["won"].values():
            assert all(f["discrepancy"] > 0.0 and 0.0 <= f["agreement"] <= 1.0 for f in found.values())
        assert len(won_lines(data)) == len(data["won"]["rounded"]) + 2

    @pytest.mark.parametrize(("name", "stages"), [("bert-cls", TRAINED), ("llama-tied", WRITTEN), ("t5-tied", WRITTEN)])
    def test_compensation_needs_sequences_that_were_written(self, name, stages, tmp_path):
        model = load(name, tmp_path)
        won = model.config.quantization_config.recipe["calibration"]["won"]
        assert list(won) == stages

    def test_the_card_says_what_was_won(self, tmp_path):
        load("bert-cls", tmp_path / "float").save_pretrained(tmp_path / "packed")
        card = (tmp_path / "packed" / "README.md").read_text()
        assert "- data: kind generated token sequences, count 24, seed 0, seconds " in card
        assert re.search(r"- single text: distance from the float model \d\.\d{4} rounded, \d\.\d{4} now; equal", card)
        assert "- kept: the trained model" in card

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


class TestRanges:
    @pytest.mark.parametrize(("bits", "granularity"), [(2, "tensor"), (2, "row"), (3, "tensor")])
    def test_by_themselves(self, tmp_path, bits, granularity):
        """ "lsq" where one scale serves a whole matrix at 2 bits, "mse" elsewhere and for tables."""
        settings = {"weight_bits": bits, "granularity": granularity, "start": "rounding", "steps": 1}
        settings |= {"learning_rate": 1e-12, "scale_learning_rate": 1e-12}
        found, mse, lsq = (
            {name: layer.weight_scale for name, layer in low_bit_layers(load("bert-cls", tmp_path, **settings, ranges=r))}
            for r in ("auto", "mse", "lsq")
        )
        for name, scale in found.items():
            expected = lsq if "embeddings" not in name and (bits, granularity) == (2, "tensor") else mse
            torch.testing.assert_close(scale, expected[name])

    def test_with_static_inputs(self, tmp_path):
        model = load("bert-cls", tmp_path, ranges="auto", activations="static")
        assert model.config.quantization_config.ranges == "auto"
        assert logits(model).isfinite().all()


class TestGenerator:
    def test_by_itself(self, tmp_path):
        names = {"bert-cls": "PriorSource", "llama-tied": "WrittenSource", "t5-tied": "AnsweredSource"}
        for name, source in names.items():
            assert type(make_generator(make(name), ZSAQConfig(**SHORT)).source).__name__ == source

    def test_an_encoder_writes_nothing(self):
        with pytest.raises(ValueError, match="generator='teacher' needs a model that writes, and this is a BertFor"):
            make_generator(make("bert-cls"), ZSAQConfig(**SHORT, generator="teacher"))

    def test_a_language_model_in_memory_is_stored_by_name(self, tmp_path):
        writer = make("llama-tied")
        config = ZSAQConfig(**SHORT, generator=writer)
        assert config.to_dict()["generator"] == "LlamaForCausalLM"
        make("bert-cls").save_pretrained(tmp_path)
        model = type(make("bert-cls")).from_pretrained(tmp_path, quantization_config=config)
        assert model.config.quantization_config.to_dict()["generator"] == "LlamaForCausalLM"

    def test_a_source_of_ones_own(self):
        source = PriorSource(torch.ones(99))
        config = ZSAQConfig(**SHORT, generator=source)
        assert make_generator(make("bert-cls"), config).source is source
        assert config.to_dict()["generator"] == "PriorSource"


class TestState:
    def interrupted(self, tmp_path, monkeypatch, at: int = 30, **settings):
        """A training that stops at a step, and leaves its state."""
        step = Minimax.step

        def stop(run):
            if run.done == at:
                raise KeyboardInterrupt
            return step(run)

        with monkeypatch.context() as patch:
            patch.setattr(Minimax, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                load("bert-cls", tmp_path / "float", steps=40, state=str(tmp_path / "state"), **settings)

    @pytest.mark.parametrize("settings", [{}, {"generator_every": 4, "rho": 0.05}, {"activations": "static"}], ids=str)
    def test_goes_on_bit_for_bit(self, tmp_path, monkeypatch, settings):
        whole = load("bert-cls", tmp_path / "float", steps=40, **settings)
        self.interrupted(tmp_path, monkeypatch, **settings)
        again = load("bert-cls", tmp_path / "float", steps=40, state=str(tmp_path / "state"), **settings)
        assert torch.equal(logits(whole), logits(again))
        assert not (tmp_path / "state").exists()
        assert "state" not in again.config.quantization_config.to_dict()

    def test_of_other_settings_or_another_model(self, tmp_path, monkeypatch):
        self.interrupted(tmp_path, monkeypatch)
        options = {"steps": 40, "state": str(tmp_path / "state")}
        with pytest.raises(ValueError, match="state is the state of a training with other settings; delete it"):
            load("bert-cls", tmp_path / "float", learning_rate=5e-4, **options)
        make("bert-cls", seed=3).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="state is the state of a training with another model; delete it"):
            type(make("bert-cls")).from_pretrained(
                tmp_path / "other", quantization_config=ZSAQConfig(**{**SHORT, **options})
            )

    @pytest.mark.parametrize("content", [b"", b"no state"], ids=["empty", "other"])
    def test_a_damaged_file(self, tmp_path, content):
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(
            ValueError, match="state is no state of a training, or is damaged; delete it, or name another file"
        ):
            load("bert-cls", tmp_path / "float", state=str(tmp_path / "state"))

    def test_a_file_cut_in_half(self, tmp_path, monkeypatch):
        self.interrupted(tmp_path, monkeypatch)
        content = (tmp_path / "state").read_bytes()
        (tmp_path / "state").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="no state of a training, or is damaged"):
            load("bert-cls", tmp_path / "float", steps=40, state=str(tmp_path / "state"))


class TestTheGuard:
    """Nothing that a user does to the training gives back something worse than rounding."""

    def rounded(self, folder) -> torch.Tensor:
        config = PreQuantConfig(weight_bits=2, embedding_bits=4, ranges="minmax")
        return logits(type(make("bert-cls")).from_pretrained(folder, quantization_config=config))

    @pytest.mark.parametrize("rate", [3.0, 1e30], ids=["too high", "not finite"])
    def test_a_learning_rate_that_ruins_it(self, tmp_path, rate):
        model = load("bert-cls", tmp_path, weight_bits=2, learning_rate=rate, start="rounding", guard=True)
        data = model.config.quantization_config.recipe["calibration"]
        assert data["kept"] == "rounded"
        assert torch.equal(logits(model), self.rounded(tmp_path))
        assert any(line.startswith("kept: rounding, nothing of the training, because") for line in won_lines(data))

    def test_its_state_goes_on(self, tmp_path, monkeypatch):
        settings = {"weight_bits": 2, "guard": True, "learning_rate": 1e-3}
        whole = load("bert-cls", tmp_path / "float", steps=40, **settings)
        TestState().interrupted(tmp_path, monkeypatch, **settings)
        again = load("bert-cls", tmp_path / "float", steps=40, state=str(tmp_path / "state"), **settings)
        data = [m.config.quantization_config.recipe["calibration"] for m in (whole, again)]
        assert data[0]["won"] == data[1]["won"]
        assert data[0]["kept"] == data[1]["kept"]
        assert torch.equal(logits(whole), logits(again))

    def test_without_it_a_loss_that_is_not_finite_is_an_error(self, tmp_path):
        with pytest.raises(FloatingPointError, match="Try a smaller learning_rate"):
            load("bert-cls", tmp_path, weight_bits=2, learning_rate=1e30)


class TestOutputs:
    def test_count_if_asked(self, tmp_path):
        with_outputs = load("bert-cls", tmp_path, output_weight=1.0)
        assert not torch.equal(logits(with_outputs), logits(load("bert-cls", tmp_path)))

    def test_of_a_regression_are_compared_by_their_squared_error(self, tmp_path):
        """The KL divergence of one output is always zero, and nothing would be learned."""
        make("bert-cls", num_labels=1).save_pretrained(tmp_path)
        cls, settings = type(make("bert-cls")), {**SHORT, "hidden_weight": 0.0, "output_weight": 1.0}
        model = cls.from_pretrained(tmp_path, quantization_config=ZSAQConfig(**settings))
        assert model.config.quantization_config.recipe["calibration"]["won"]["rounded"]["single text"]["discrepancy"] > 0.0

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


@pytest.mark.parametrize(
    ("bits", "rates"),
    [
        ({"weight_bits": 2}, (2e-4, 1e-4)),
        ({"weight_bits": 2, "granularity": "tensor"}, (3e-4, 1e-4)),
        ({"weight_bits": 3}, (1e-4, 1e-4)),
        ({"weight_bits": 4}, (3e-5, 3e-5)),
        ({"weight_bits": 4, "activation_bits": None}, (3e-5, 3e-5)),
        ({"weight_bits": 4, "activation_bits": 4}, (1e-4, 1e-4)),
        ({"weight_bits": 2, "learning_rate": 1e-3}, (1e-3, 1e-4)),
    ],
)
def test_rates_that_nobody_gave_follow_the_bits(bits, rates):
    settings = ZSAQConfig(**bits).settings()
    assert (settings.learning_rate, settings.scale_learning_rate) == rates
