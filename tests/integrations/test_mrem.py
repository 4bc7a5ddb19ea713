"""Reconstruction while a model loads: what comes out, what is refused."""

import copy
import json

import pytest
import torch
from tiny_models import logits, make, make_tokenizer

from optimum_zsaq import LowBitConfig, MREMConfig, PreQuantConfig
from optimum_zsaq.algorithms.offload import OffloadedBlocks
from optimum_zsaq.algorithms.reconstruction import StageTraining
from optimum_zsaq.integrations.configs import ALGORITHMS
from optimum_zsaq.integrations.reconstruct import calibration_batches, won_lines
from optimum_zsaq.layers import FakeQuantLinear, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


TEXTS = [" ".join(f"w{5 + (7 * i + j) % 90}" for j in range(3 + i % 9)) for i in range(14)]
SHORT = {"steps": 4, "batch_size": 4, "stages": 2, "ranges": "minmax", "embedding_bits": 4, "weight_bits": 2}
SHORT |= {"start_samples": 4, "autocast": "float32", "queue": 2, "calibration_data": TEXTS}


@pytest.fixture
def load(tmp_path):
    """Quantizes a model of `tiny_models` on load; what is given are fields of the config."""

    def found(name: str, dtype=None, tokenizer: bool = True, **settings):
        model = make(name)
        model.to(dtype or torch.float32).save_pretrained(tmp_path / name)
        if tokenizer:
            make_tokenizer().save_pretrained(tmp_path / name)
        config = MREMConfig(**{**SHORT, **settings})
        return type(model).from_pretrained(tmp_path / name, quantization_config=config)

    return found


def same(one, other) -> bool:
    return torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("name", ["bert", "bert-cls", "gpt2-tied", "llama-tied", "t5-tied", "bart-tied"])
def test_every_family_gives_a_packed_model_that_reloads_as_it_is(name, parallel, load, tmp_path):
    model = load(name, parallel=parallel)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert same(model, again)
    assert isinstance(again.config.quantization_config, MREMConfig)
    assert any(isinstance(layer, PackedLinear) for _, layer in low_bit_layers(model))
    assert not any(p.grad is not None for p in model.parameters())
    rounded = PreQuantConfig(weight_bits=2, embedding_bits=4, ranges="minmax")
    assert not same(model, type(model).from_pretrained(tmp_path / name, quantization_config=rounded))


class TestTheResult:
    def test_a_seed_decides_it(self, load):
        first, second, other = (load("bert-cls", seed=seed) for seed in (1, 1, 2))
        assert same(first, second)
        assert not same(first, other)

    def test_leaves_the_global_random_numbers_alone(self, load):
        model = load("bert-cls")
        before = torch.get_rng_state()
        type(model).from_pretrained(model.config.name_or_path, quantization_config=MREMConfig(**SHORT))
        assert torch.equal(torch.get_rng_state(), before)

    def test_fake_quantized_on_demand(self, load):
        model = load("bert-cls", packed=False)
        assert any(isinstance(layer, FakeQuantLinear) for _, layer in low_bit_layers(model))

    def test_keeps_the_dtype_of_what_stays_float(self, load):
        model = load("bert-cls", dtype=torch.bfloat16)
        assert model.dtype == model.classifier.weight.dtype == torch.bfloat16
        assert all(layer.weight_scale.dtype == torch.float32 for _, layer in low_bit_layers(model))

    @pytest.mark.parametrize("parallel", [False, True])
    def test_static_inputs(self, load, parallel):
        model = load("bert-cls", activations="static", parallel=parallel)
        scales = [layer.input_scale for _, layer in low_bit_layers(model) if layer.input_scale is not None]
        assert scales
        assert all(scale.isfinite().all() for scale in scales)

    def test_the_recipe_says_how_it_was_made_and_holds_no_text(self, load, tmp_path):
        model = load("bert-cls")
        data = model.config.quantization_config.recipe["calibration"]
        assert (data["kind"], data["count"], len(data["sha256"])) == ("list", 14, 64)
        assert list(data["won"]) == ["stage 1 of 2", "stage 2 of 2"]
        assert all(found["first error"] > 0.0 < found["last error"] for found in data["won"].values())
        assert len(won_lines(data)) == 2
        model.save_pretrained(tmp_path / "packed")
        assert "w6" not in (tmp_path / "packed" / "config.json").read_text()
        assert "- stage 1 of 2: first error 0." in (tmp_path / "packed" / "README.md").read_text()

    def test_four_stages_or_as_many_as_there_are_blocks(self, load):
        model = load("bert-cls", stages=None)
        assert len(model.config.quantization_config.recipe["calibration"]["won"]) == 2

    @pytest.mark.parametrize(
        ("fields", "start"),
        [
            ({}, "compensated"),
            ({"granularity": "tensor"}, "rounding"),
            ({"granularity": "tensor", "weight_bits": 3}, "compensated"),
            ({"ranges": "ternary"}, "rounding"),
            ({"granularity": "tensor", "start": "compensated"}, "compensated"),
        ],
    )
    def test_the_start_follows_the_weights(self, fields, start):
        assert MREMConfig(**{**SHORT, **fields}).settings(2).start == start

    def test_the_users_config_is_left_as_it_was(self, load):
        model, config = load("bert-cls"), MREMConfig(**SHORT)
        before = config.to_dict()
        type(model).from_pretrained(model.config.name_or_path, quantization_config=config)
        assert config.to_dict() == before
        assert config.calibration_data is TEXTS

    def test_trains_under_no_grad_of_the_caller(self, load):
        expected = load("bert-cls")
        with torch.no_grad():
            assert same(load("bert-cls"), expected)

    def test_activations_on_disk_change_nothing(self, load):
        model = load("bert-cls", cache_limit=0.0)
        assert same(model, load("bert-cls"))
        assert "cache_limit" not in model.config.quantization_config.to_dict()

    @pytest.mark.parametrize("name", ["bert-cls", "gpt2-tied", "llama-tied", "bart-tied"])
    def test_blocks_on_disk_change_little(self, load, name, tmp_path):
        offloaded, whole = load(name, offload=True), load(name)
        found, expected = logits(offloaded), logits(whole)
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert "offload" not in offloaded.config.quantization_config.to_dict()
        offloaded.save_pretrained(tmp_path / "packed")
        assert same(offloaded, type(offloaded).from_pretrained(tmp_path / "packed"))

    def test_blocks_on_disk_leave_nothing_there(self, load, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        model = load("bert-cls", offload=True)
        assert model.config.quantization_config.packed
        assert not list(tmp_path.glob("blocks-*"))

    def test_a_full_disk_is_told(self, load, tmp_path, monkeypatch):
        put, count = OffloadedBlocks.put, [0]

        def fill(*arguments):
            count[0] += 1
            if count[0] == 5:
                raise OSError(28, "No space left on device")
            put(*arguments)

        monkeypatch.setattr(OffloadedBlocks, "put", fill)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(ValueError, match="offload=True could not write .*No space left on device; free as much space"):
            load("bert-cls", offload=True)
        assert not list(tmp_path.glob("blocks-*"))

    def test_blocks_on_disk_of_another_dtype(self, load):
        model = load("llama-tied", dtype=torch.bfloat16, offload=True)
        assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.bfloat16}

    def test_ternary(self, load):
        model = load("bert-cls", ranges="ternary")
        assert logits(model).isfinite().all()


class TestData:
    def test_kinds_are_the_same(self, load, tmp_path):
        from datasets import Dataset

        (tmp_path / "a.txt").write_text("\n".join(TEXTS))
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"sentence": text, "label": 1}) for text in TEXTS))
        kinds = [TEXTS, [{"text": text} for text in TEXTS], Dataset.from_dict({"text": TEXTS, "label": [0] * 14})]
        kinds += [tmp_path / "a.txt", str(tmp_path / "a.jsonl")]
        models = [load("bert-cls", calibration_data=data) for data in kinds]
        assert all(same(model, models[0]) for model in models)

    def test_pairs(self, load):
        pairs = [{"text": text, "text_pair": text[::-1]} for text in TEXTS]
        assert not same(load("bert-cls", calibration_data=pairs), load("bert-cls"))

    def test_batches_are_of_texts_of_about_the_same_length(self, load):
        model = load("bert-cls")
        batches, _ = calibration_batches(model, MREMConfig(**SHORT).sized(False))
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 2]
        lengths = [batch["attention_mask"].sum(-1).tolist() for batch in batches]
        assert sorted(sum(lengths, [])) == sum(lengths, [])

    def test_samples_are_taken_from_the_beginning(self, load):
        assert same(load("bert-cls", calibration_samples=6), load("bert-cls", calibration_data=TEXTS[:6]))

    def test_a_length_of_its_own(self, load):
        config = MREMConfig(**SHORT, sequence_length=5)
        batches, _ = calibration_batches(load("bert-cls"), config.sized(False))
        assert max(batch["input_ids"].shape[1] for batch in batches) == 5

    @pytest.mark.parametrize("name", ["bert-cls", "llama-tied", "t5-tied"])
    def test_zero_shot_needs_no_data_and_no_tokenizer(self, load, name):
        settings = {"calibration_data": "zero-shot", "calibration_samples": 10, "sequence_length": 12}
        model = load(name, tokenizer=False, **settings)
        data = model.config.quantization_config.recipe["calibration"]
        assert (data["kind"], data["count"], data["seed"]) == ("generated token sequences", 10, 0)
        assert same(model, load(name, tokenizer=False, **settings))


class TestState:
    def interrupted(self, monkeypatch, load, at: int, **settings) -> None:
        """A training that is stopped in its `at`-th step."""
        step, count = StageTraining.step, [0]

        def stop(*arguments):
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            return step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(StageTraining, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                load("bert-cls", **settings)

    @pytest.mark.parametrize(
        ("mode", "at"), [("whole", 32), ("whole", 61), ("offload", 32), ("offload", 61), ("parallel", 55), ("parallel", 20)]
    )
    def test_goes_on_bit_for_bit(self, monkeypatch, load, tmp_path, mode, at):
        settings = {"parallel": mode == "parallel", "offload": mode == "offload", "steps": 30}
        whole = load("bert-cls", **settings)
        settings["state"] = str(tmp_path / "state")
        kept = at > 30 and at != 61
        if at == 61:  # all stages are done
            monkeypatch.setattr("optimum_zsaq.integrations.reconstruct.finish_training", _fail)
            with pytest.raises(RuntimeError, match="stopped"):
                load("bert-cls", **settings)
            monkeypatch.undo()
            (tmp_path / "state").unlink(missing_ok=True)
        else:
            self.interrupted(monkeypatch, load, at, **settings)
            assert (tmp_path / "state").exists() == kept
        again = load("bert-cls", **settings)
        assert same(whole, again)
        assert not (tmp_path / "state").exists()
        assert "state" not in again.config.quantization_config.to_dict()
        figures = [copy.copy(m.config.quantization_config.recipe["calibration"]["won"]) for m in (whole, again)]
        assert figures[0] == figures[1]

    def test_of_other_data_settings_or_another_model(self, monkeypatch, load, tmp_path):
        settings = {"steps": 30, "state": str(tmp_path / "state")}
        self.interrupted(monkeypatch, load, 32, **settings)
        for other in ({"calibration_data": TEXTS[1:]}, {"learning_rate": 1e-3}, {"parallel": True}):
            with pytest.raises(ValueError, match="state is the state of a training with other settings; delete it"):
                load("bert-cls", **settings, **other)
        with pytest.raises(ValueError, match="state is the state of a training with another model; delete it"):
            load("bert", **settings)


def _fail(*_):
    raise RuntimeError("stopped")


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"calibration_data": None}, "MREM learns from texts and got no calibration_data; give MREMConfig"),
            ({"calibration_data": []}, "calibration_data holds no text"),
            ({"calibration_data": ["", " "]}, "calibration_data holds no text"),
            ({"calibration_data": [{"sentences": "w5"}]}, r"samples with \['sentences'\], and MREM uses texts alone"),
            (
                {"calibration_data": [{"text": "w5", "label": 1}]},
                r"samples with \['label'\], and MREM uses texts alone, no",
            ),
            ({"calibration_data": [("w5", 1)]}, "a sample without text"),
            ({"calibration_data": [" ".join(["w5"] * n) for n in (90, 100)]}, "longer than the 78 tokens .* has 92"),
            ({"stages": 3}, "stages=3 is not possible: BertForSequenceClassification has 2 blocks .* use 1 to 2"),
            ({"modules_to_not_convert": ["encoder", "pooler", "embeddings"]}, "nothing to quantize"),
        ],
    )
    def test_on_load(self, load, settings, message):
        with pytest.raises(ValueError, match=message):
            load("bert-cls", **settings)

    def test_a_dataset_with_another_column(self, load):
        from datasets import Dataset

        with pytest.raises(ValueError, match="a sample without text: {'sentences': "):
            load("bert-cls", calibration_data=Dataset.from_dict({"sentences": TEXTS}))

    def test_a_new_head(self, load):
        folder = load("bert").config.name_or_path
        with pytest.raises(ValueError, match=r"no \['classifier.weight'.*: MREM trains against the float model's answers"):
            type(make("bert-cls")).from_pretrained(folder, quantization_config=MREMConfig(**SHORT))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"parallel": True}, "parallel=True trains all stages at once; leave one of the two out"),
            ({"activations": "static"}, "activations='static' needs passes of the whole model"),
            ({"calibration_data": "zero-shot"}, "calibration_data='zero-shot' needs passes of the whole model"),
            ({"packed": False}, "packed=False keeps all float weights"),
            ({"smoothing": 0.5}, "smoothing=0.5 needs a pass of the whole model"),
        ],
    )
    def test_blocks_on_disk_with_what_needs_them_all(self, settings, message):
        with pytest.raises(ValueError, match=f"offload=True does not go with this: {message}"):
            MREMConfig(**{**SHORT, "offload": True, **settings})

    def test_texts_without_a_tokenizer(self, load):
        with pytest.raises(ValueError, match="tokenizer"):
            load("bert-cls", tokenizer=False)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("stages", 0),
            ("steps", 0),
            ("batch_size", 0),
            ("start_samples", 1.5),
            ("sequence_length", 2),
            ("queue", 0),
            ("cache_limit", -1.0),
            ("timeout", 0.0),
            ("forcing", 2.0),
            ("targets", "none"),
            ("start", "gptq"),
            ("autocast", "int8"),
            ("parallel", "yes"),
            ("learning_rate", -1.0),
        ],
    )
    def test_values(self, field, value):
        with pytest.raises(ValueError, match=rf"{field}={value!r} is"):
            MREMConfig(**{field: value})

    def test_fields(self):
        with pytest.raises(ValueError, match="MREMConfig has no field 'stage'; did you mean 'stages'"):
            MREMConfig(stage=2)
        with pytest.raises(ValueError, match="start='compensated' does not go with ranges='ternary'"):
            MREMConfig(ranges="ternary", weight_bits=2, start="compensated")

    @pytest.mark.parametrize(("bits", "rate"), [(2, 3e-4), (3, 3e-4), (4, 1e-4), (8, 1e-4)])
    def test_rates_go_with_the_width(self, bits, rate):
        settings = MREMConfig(weight_bits=bits).settings(1)
        assert (settings.learning_rate, settings.scale_learning_rate) == (rate, rate)
        assert MREMConfig(weight_bits=bits, learning_rate=1e-3).settings(1).learning_rate == 1e-3

    @pytest.mark.parametrize(("bits", "rate"), [(2, 1e-3), (3, 3e-4), (4, 1e-4), (8, 1e-4)])
    def test_decoders_have_rates_and_an_error_of_their_own(self, bits, rate):
        settings = MREMConfig(weight_bits=bits).sized(True).settings(1)
        assert (settings.learning_rate, settings.scale_learning_rate) == (rate, 1e-6)
        assert (settings.output_weight, settings.relative_to, settings.steps) == (0.0, "position", 60)
        assert settings.cache == 2**28
        other = MREMConfig(weight_bits=bits).sized(False).settings(1)
        assert (other.output_weight, other.relative_to, other.steps, other.cache) == (1.0, "all", 120, None)
        asked = (
            MREMConfig(weight_bits=bits, learning_rate=2e-3, output_weight=0.5, relative_to="all").sized(True).settings(1)
        )
        assert (asked.learning_rate, asked.scale_learning_rate) == (2e-3, 1e-6)
        assert (asked.output_weight, asked.relative_to) == (0.5, "all")

    def test_is_registered(self):
        assert ALGORITHMS["mrem"] is MREMConfig
        config = MREMConfig(stages=3, weight_bits=2)
        assert LowBitConfig.from_dict(config.to_dict()) == config
