"""Outlier adapters as PEFT, transformers and Trainer meet them: positions, files, bases that do not fit, bad input."""

import copy
import json
import time

import pytest
import torch
import transformers as tf
from outlier_adapters import base_model, config, layers, randomized, same, train
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import inputs, logits, make, quantized, token_ids

import optimum_zsaq
from optimum_zsaq import OutlierConfig
from optimum_zsaq.integrations.outlier_layer import POSITIONS, VALUES
from optimum_zsaq.integrations.peft import register_outliers
from optimum_zsaq.layers import PackedLinear
from optimum_zsaq.surgery import low_bit_layers


# PEFT asks for `is_gradient_checkpointing`, which transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class TestStart:
    def test_zero_leaves_the_stored_residuals_out(self, tmp_path):
        """A trained position then starts at its bare code; other stored residuals stay."""
        base = quantized("bert-cls", tmp_path, outliers=0.02, kernel="reference")
        bare = copy.deepcopy(base)
        for _, layer in low_bit_layers(bare):
            if isinstance(layer, PackedLinear):
                layer.weight_outlier_values.zero_()
        assert same(logits(get_peft_model(base, config(start="zero"))), logits(bare))

    @pytest.mark.parametrize("kind", ["packed-without", "float"])
    def test_zero_is_the_base_where_it_stores_none(self, kind, tmp_path):
        base = base_model(kind, "bert-cls", tmp_path)
        expected = logits(base)
        assert same(logits(get_peft_model(base, config(start="zero"))), expected)

    def test_zero_at_other_positions_changes_those_alone(self, tmp_path):
        base = quantized("bert-cls", tmp_path, outliers=0.02)
        model = get_peft_model(base, config(start="zero", criterion="random", fraction=0.5))
        for layer in layers(model).values():
            stored = dict(
                zip(layer.base_layer.weight_outlier_positions.tolist(), layer.base_layer.weight_outlier_values, strict=True)
            )
            at, values = getattr(layer, POSITIONS)["default"].tolist(), getattr(layer, VALUES)["default"]
            assert values.tolist() == [-stored.get(p, torch.tensor(0.0)).item() for p in at]


class TestPositions:
    def test_the_default_is_what_the_base_stores(self, tmp_path):
        model = get_peft_model(quantized("bert-cls", tmp_path, outliers=0.02), OutlierConfig())
        assert model.peft_config["default"].criterion == "stored"
        for layer in layers(model).values():
            assert torch.equal(getattr(layer, POSITIONS)["default"], layer.base_layer.weight_outlier_positions)

    def test_without_stored_ones_the_largest_magnitudes(self, tmp_path):
        model = get_peft_model(quantized("bert-cls", tmp_path), config())
        assert model.peft_config["default"].criterion == "magnitude"

    def test_over_the_whole_model_some_layers_may_have_none(self, tmp_path):
        model = get_peft_model(make("bert-cls"), OutlierConfig(fraction=0.0005, scope="model", criterion="random"))
        counts = model.peft_config["default"].counts
        weights = sum(layer.out_features * layer.in_features for layer in layers(model).values())
        assert sum(counts.values()) == round(0.0005 * weights)
        assert 0 in counts.values()
        train(model)
        expected = logits(randomized(model))
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(make("bert-cls"), tmp_path)), expected)

    def test_an_adapter_chosen_on_float_weights_serves_the_packed_model(self, tmp_path):
        """|W - Q(W)| needs both; the fake-quantized and the packed model have the same fingerprint."""
        model = get_peft_model(quantized("bert-cls", tmp_path, packed=False), config(criterion="error"))
        randomized(model).save_pretrained(tmp_path / "adapter")
        packed = PeftModel.from_pretrained(quantized("bert-cls", tmp_path), tmp_path / "adapter")
        assert same(logits(packed), logits(model))

    def test_a_config_may_be_used_again(self, tmp_path):
        one = config(criterion="magnitude")
        get_peft_model(make("bert-cls"), one)
        model = get_peft_model(make("bert-cls", seed=1), one)
        expected = get_peft_model(make("bert-cls", seed=1), config(criterion="magnitude"))
        for found, wanted in zip(layers(model).values(), layers(expected).values(), strict=True):
            assert torch.equal(getattr(found, POSITIONS)["default"], getattr(wanted, POSITIONS)["default"])

    def test_what_a_config_says_of_a_base_stays_with_the_adapter(self, tmp_path):
        one = config(task_type="SEQ_CLS")
        first = randomized(get_peft_model(base_model("packed", "bert-cls", tmp_path), one))
        get_peft_model(base_model("packed-without", "bert-cls", tmp_path), one)
        assert (one.counts, one.base_fingerprint, one.criterion, one.target_modules) == (None, None, None, None)
        first.save_pretrained(tmp_path / "one")
        again = PeftModel.from_pretrained(base_model("packed", "bert-cls", tmp_path), tmp_path / "one")
        assert torch.equal(logits(again), logits(first))

    def test_loading_never_computes_them(self, tmp_path, monkeypatch):
        model = randomized(get_peft_model(make("bert-cls"), config(criterion="magnitude")))
        expected = logits(model)
        model.save_pretrained(tmp_path)
        monkeypatch.setattr("optimum_zsaq.integrations.peft.choose_outliers", None)
        assert torch.equal(logits(PeftModel.from_pretrained(make("bert-cls"), tmp_path)), expected)


class TestTransformers:
    """The same through transformers' own methods."""

    def test_add_save_load_delete(self, tmp_path):
        quantized("llama-tied", tmp_path, outliers=0.02).save_pretrained(tmp_path / "base")
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        plain = logits(model)
        model.add_adapter(OutlierConfig(task_type="CAUSAL_LM"))
        assert torch.equal(logits(model), plain)
        expected = logits(randomized(model))
        model.save_pretrained(tmp_path / "adapter")
        written = {file.name for file in (tmp_path / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= written
        assert "model.safetensors" not in written
        for load in (tf.AutoModelForCausalLM, AutoPeftModelForCausalLM, tf.LlamaForCausalLM):
            assert torch.equal(logits(load.from_pretrained(tmp_path / "adapter")), expected), load
        again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        again.load_adapter(tmp_path / "adapter", adapter_name="one")
        assert torch.equal(logits(again), expected)
        again.disable_adapters()
        assert torch.equal(logits(again), plain)
        again.enable_adapters()
        again.add_adapter(config(criterion="random"), "two")
        assert torch.equal(logits(again), plain)
        again.set_adapter("one")
        assert torch.equal(logits(again), expected)
        again.delete_adapter("one")
        again.set_adapter("two")
        assert torch.equal(logits(again), plain)

    def test_trainer_trains_saves_and_resumes_bit_for_bit(self, tmp_path):
        def trainer(folder, steps):
            base = quantized("bert-cls", tmp_path, outliers=0.02)
            base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.0
            model = get_peft_model(base, OutlierConfig(task_type="SEQ_CLS", train_norms=True, train_biases=True))
            options = {"save_steps": 2, "save_strategy": "steps", "max_steps": steps, "learning_rate": 0.01}
            options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
            rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(token_ids(8, 7))]
            arguments = tf.TrainingArguments(str(folder), per_device_train_batch_size=2, **options)
            return tf.Trainer(model, arguments, train_dataset=rows)

        whole = trainer(tmp_path / "whole", 4)
        whole.train()
        files = {file.name for file in (tmp_path / "whole" / "checkpoint-2").iterdir()}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
        resumed = trainer(tmp_path / "resumed", 4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        states = [get_peft_model_state_dict(one.model) for one in (whole, resumed)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert any(not torch.equal(state, torch.zeros_like(state)) for key, state in states[0].items() if VALUES in key)

    def test_the_config_is_found_by_its_folder(self, tmp_path):
        get_peft_model(make("bert-cls"), config(target_modules=["query", "value"])).save_pretrained(tmp_path)
        found = PeftConfig.from_pretrained(tmp_path)
        assert type(found) is OutlierConfig
        assert found.target_modules == {"query", "value"}
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        assert stored["peft_type"] == "OPTIMUM_ZSAQ"
        assert "check_base" not in stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A packed base of a size at which file headers weigh little, saved, and two adapters trained on it."""
    folder = tmp_path_factory.mktemp("bars")
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 12}
    make("bert-cls", **sizes).save_pretrained(folder / "float")
    settings = optimum_zsaq.PreQuantConfig(weight_bits=4, embedding_bits=4, outliers=0.005, ranges="minmax")
    base = tf.BertForSequenceClassification.from_pretrained(folder / "float", quantization_config=settings)
    base.save_pretrained(folder / "base")
    for task in ("one", "two"):
        base = tf.BertForSequenceClassification.from_pretrained(folder / "base")
        _, model = train(get_peft_model(base, OutlierConfig(task_type="SEQ_CLS")), steps=2)
        model.save_pretrained(folder / task)
    return folder, model


class TestBars:
    """What is promised of one base and its adapters."""

    def test_size_of_the_file_and_share_of_the_weights(self, trained):
        folder, model = trained
        values = sum(layer.get_parameter(f"{VALUES}.default").numel() for layer in layers(model).values())
        weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
        assert values <= 0.00501 * weights
        head = sum(p.numel() * 4 for n, p in model.named_parameters() if "modules_to_save" in n)
        size = (folder / "one" / "adapter_model.safetensors").stat().st_size - head
        assert size <= 8 * values * 1.1

    def test_frozen_codes_are_those_of_the_file(self, trained):
        folder, model = trained
        saved = load_file(folder / "base" / "model.safetensors")
        again = model.unload()
        again.save_pretrained(folder / "again")
        found = load_file(folder / "again" / "model.safetensors")
        wanted = {key for key in saved if not key.startswith("classifier")}
        assert len([key for key in wanted if key.endswith("weight_codes")]) == 14
        assert all(torch.equal(saved[key].view(torch.uint8), found[key].view(torch.uint8)) for key in wanted)

    def test_two_tasks_on_one_base(self, trained):
        """Each as by itself, switched in under 10 ms, the codes once in memory."""
        folder, _ = trained
        alone = {
            task: logits(
                PeftModel.from_pretrained(tf.BertForSequenceClassification.from_pretrained(folder / "base"), folder / task)
            )
            for task in ("one", "two")
        }
        base = tf.BertForSequenceClassification.from_pretrained(folder / "base")
        tensors = {id(t) for t in (*base.parameters(), *base.buffers())}
        model = PeftModel.from_pretrained(base, folder / "one", adapter_name="one")
        model.load_adapter(folder / "two", adapter_name="two")
        seconds = []
        for task in ("two", "one") * 5:
            begun = time.perf_counter()
            model.set_adapter(task)
            seconds.append(time.perf_counter() - begun)
            assert torch.equal(logits(model), alone[task])
        assert sorted(seconds)[5] < 0.01
        added = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in tensors]
        files = sum((folder / task / "adapter_model.safetensors").stat().st_size for task in ("one", "two"))
        assert sum(t.numel() * t.element_size() for t in added) <= files


class TestErrors:
    def test_another_base(self, tmp_path):
        get_peft_model(quantized("bert-cls", tmp_path, outliers=0.02), OutlierConfig()).save_pretrained(
            tmp_path / "adapter"
        )
        bases = {
            "trained on one of '13 x W4 row, A8 dynamic, outliers=0.02; .* this model is '13 x W3": {
                "weight_bits": 3,
                "outliers": 0.02,
            },
            "the scheme is the same, the weights are not": {"model_seed": 1, "outliers": 0.02},
            "this model is '13 x W4 row, A8 dynamic; ": {},
        }
        for message, settings in bases.items():
            base = quantized("bert-cls", tmp_path, **settings)
            expected = logits(base)
            for load in (
                lambda b: PeftModel.from_pretrained(b, tmp_path / "adapter"),
                lambda b: b.load_adapter(tmp_path / "adapter"),
            ):
                with pytest.raises(ValueError, match=f"the adapter belongs to another base: .*{message}"):
                    load(base)
            assert torch.equal(logits(base), expected)
            assert not layers(base)
        with pytest.raises(ValueError, match="this model is '13 x float, float32'"):
            PeftModel.from_pretrained(make("bert-cls"), tmp_path / "adapter")

    def test_who_insists_gets_it(self, tmp_path):
        model = randomized(get_peft_model(quantized("bert-cls", tmp_path, outliers=0.02), OutlierConfig()))
        model.save_pretrained(tmp_path / "adapter")
        insisting = PeftConfig.from_pretrained(tmp_path / "adapter")
        insisting.check_base = False
        other = {"weight_bits": 3, "outliers": 0.02}
        found = PeftModel.from_pretrained(quantized("bert-cls", tmp_path, **other), tmp_path / "adapter", config=insisting)
        expected = logits(found)
        again = PeftModel.from_pretrained(quantized("bert-cls", tmp_path, **other), tmp_path / "adapter", check_base=False)
        assert torch.equal(logits(again), expected)
        native = quantized("bert-cls", tmp_path, **other)
        native.load_adapter(tmp_path / "adapter", peft_config=insisting)
        assert torch.equal(logits(native), expected)

    def test_heads_and_task_norms_do_not_make_another_base(self, tmp_path):
        get_peft_model(quantized("bert-cls", tmp_path, outliers=0.02), OutlierConfig()).save_pretrained(
            tmp_path / "adapter"
        )
        base = quantized("bert-cls", tmp_path, outliers=0.02)
        torch.nn.init.normal_(base.classifier.weight)
        PeftModel.from_pretrained(base, tmp_path / "adapter")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fraction": 0.0}, "fraction=0.0 is not a share of the weights; use a number in"),
            ({"fraction": 1.5}, "fraction=1.5 is not a share"),
            ({"criterion": "size"}, "criterion='size' is unknown; use one of .*'magnitude'"),
            ({"scope": "layer"}, "scope='layer' is unknown"),
            ({"start": "float"}, "start='float' is unknown; use one of .*'residual'"),
            ({"seed": 0.5}, "seed=0.5 is not an integer"),
        ],
    )
    def test_illegal_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            OutlierConfig(**options)

    def test_targets(self, tmp_path):
        base = quantized("bert-cls", tmp_path)
        for names, what in (
            ("word_embeddings", "an embedding table"),
            ("LayerNorm", "a LayerNorm"),
            ("attention", "a BertAttention"),
        ):
            with pytest.raises(TypeError, match=f"names bert.*{names}.*, which is {what}; outlier adapters sit on Linear"):
                get_peft_model(base, OutlierConfig(target_modules=[names]))
        with pytest.raises(ValueError, match="Target modules {'nothing'} not found in the base model"):
            get_peft_model(base, OutlierConfig(target_modules=["nothing"]))
        assert not layers(base)

    def test_another_methods_layer(self):
        model = make("bert-cls")
        model.add_adapter(LoraConfig(target_modules=["query"]))
        with pytest.raises(TypeError, match="query, which is a Linear|query, which is a LoraLayer"):
            model.add_adapter(OutlierConfig(target_modules=["query"]), "outliers")

    def test_a_batch_of_several_adapters(self, tmp_path):
        model = get_peft_model(base_model("packed", "bert-cls", tmp_path), config())
        with pytest.raises(ValueError, match=r"adapter_names=\['default', 'default'\]: outlier adapters are one"):
            model(**inputs(model), adapter_names=["default", "default"])

    @pytest.mark.parametrize("kind", ["packed", "packed-without", "fake"])
    def test_layers_that_hold_integers_are_not_trained_whole(self, kind, tmp_path):
        with pytest.raises(ValueError, match="names bert.pooler.dense, which is low-bit.*modules_to_not_convert"):
            get_peft_model(base_model(kind, "bert-cls", tmp_path), config(modules_to_save=["pooler"]))

    def test_storing_changes_nothing_where_it_cannot(self, tmp_path):
        model = get_peft_model(base_model("packed", "bert-cls", tmp_path), config())
        model.base_model.set_adapter([])
        with pytest.raises(ValueError, match=r"no adapter is active.*call set_adapter\(name\), or unload\(\)"):
            model.base_model.store_and_unload()
        everything = get_peft_model(base_model("packed", "bert-cls", tmp_path), config(criterion="random", fraction=0.9999))
        with pytest.raises(ValueError, match="query cannot store its adapter: its outliers would be all of its weights"):
            everything.base_model.store_and_unload()

    def test_layers_of_inactive_adapters_store_nothing(self, tmp_path):
        model = get_peft_model(base_model("packed", "bert-cls", tmp_path), config(target_modules=["query"]))
        model.add_adapter("two", config(target_modules=["value"]))
        expected = logits(randomized(model))
        assert same(logits(model.base_model.store_and_unload()), expected)

    def test_criteria_that_a_base_cannot_serve(self, tmp_path):
        base = quantized("bert-cls", tmp_path)
        with pytest.raises(ValueError, match=r"query: criterion='error' needs \|W - Q\(W\)\|.*a packed layer has no float"):
            get_peft_model(base, OutlierConfig(criterion="error"))
        with pytest.raises(ValueError, match="query stores no outliers; use criterion='magnitude'"):
            get_peft_model(base, OutlierConfig(criterion="stored"))
        assert not layers(base)

    def test_files_that_are_cut_or_changed(self, tmp_path):
        model = randomized(get_peft_model(make("bert-cls"), config()))
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        with pytest.raises(Exception, match="[Ii]ncomplete|MetadataIncompleteBuffer"):
            PeftModel.from_pretrained(make("bert-cls"), tmp_path)
        path.write_bytes(whole)
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith(POSITIONS))
        for change, message in (
            (lambda p: p.flip(0), "do not lie ascending among the 1024 weights"),
            (lambda p: p + 2000, "do not lie ascending"),
        ):
            save_file({**tensors, key: change(tensors[key]).contiguous()}, path)
            with pytest.raises(ValueError, match=f"positions of adapter 'default' {message}"):
                logits(PeftModel.from_pretrained(make("bert-cls"), tmp_path))
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
        with pytest.warns(UserWarning, match="missing adapter keys"):
            found = PeftModel.from_pretrained(make("bert-cls"), tmp_path)
        with pytest.raises(ValueError, match="positions of adapter 'default' were never loaded"):
            logits(found)

    def test_a_stored_config_makes_no_new_adapter(self, tmp_path):
        get_peft_model(make("bert-cls"), config()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="were never loaded: its config comes from a file"):
            logits(get_peft_model(make("bert-cls"), PeftConfig.from_pretrained(tmp_path)))

    def test_another_class_of_model(self, tmp_path):
        get_peft_model(make("bert-cls"), config(target_modules=["query"])).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        stored["counts"].pop(next(iter(stored["counts"])))
        (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="sits on other layers than target_modules names in this model: it lacks"):
            PeftModel.from_pretrained(make("bert-cls"), tmp_path)

    def test_a_tied_layer_stores_nothing_of_its_own(self, tmp_path):
        model = get_peft_model(quantized("llama-tied", tmp_path), config(target_modules=["lm_head"]))
        expected = logits(randomized(model))
        with pytest.raises(ValueError, match="lm_head cannot store its adapter: it reads another layer's weight"):
            model.store_and_unload()
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("method", ["store_and_unload", "merge_and_unload", "merge_adapter"])
    def test_a_float_weight_of_two_layers_stays_as_it_is(self, method):
        model = randomized(get_peft_model(make("llama-tied"), config(target_modules=["lm_head", "q_proj"])))
        expected = logits(model)
        with pytest.raises(ValueError, match="lm_head shares its weight with another layer, which would change too"):
            getattr(model, method)()
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("kind", ["packed", "packed-without", "fake"])
    def test_a_tied_head_is_not_trained_whole(self, kind, tmp_path):
        with pytest.raises(ValueError, match="names lm_head, which reads another layer's weight"):
            get_peft_model(base_model(kind, "llama-tied", tmp_path), config(modules_to_save=["lm_head"]))

    @pytest.mark.parametrize("kind", ["packed", "fake", "float"])
    def test_a_base_without_its_weights(self, kind, tmp_path):
        get_peft_model(base_model(kind, "bert-cls", tmp_path), config()).save_pretrained(tmp_path / "adapter")
        stored = PeftConfig.from_pretrained(tmp_path / "adapter")
        stored.check_base = False
        message = "is offloaded or on the meta device; load the whole base into memory"
        for settings in (config(target_modules=["query"]), stored):
            with pytest.raises(ValueError, match=message):
                get_peft_model(base_model(kind, "bert-cls", tmp_path).to("meta"), settings)

    def test_a_share_that_is_not_used(self, tmp_path, caplog):
        model = get_peft_model(base_model("packed", "bert-cls", tmp_path), OutlierConfig(fraction=0.2))
        assert "fraction=0.2 is not used: criterion='stored' trains the outliers that the base stores" in caplog.text
        assert model.peft_config["default"].criterion == "stored"

    def test_every_layer_where_another_method_holds_some(self, tmp_path):
        model = base_model("packed", "bert-cls", tmp_path)
        model.add_adapter(LoraConfig(target_modules=["query"]), "lora")
        with pytest.raises(ValueError, match="means every Linear layer, but bert.*query and 1 more hold another method"):
            model.add_adapter(OutlierConfig(), "outliers")


class TestRegistration:
    def test_peft_lists_the_method(self):
        """The day PEFT opens or changes its list of methods, this says so."""
        register_outliers()
        assert PeftType("OPTIMUM_ZSAQ") is PeftType.OPTIMUM_ZSAQ
        assert "OPTIMUM_ZSAQ" in list(PeftType)
        assert PeftType.OPTIMUM_ZSAQ.value == "OPTIMUM_ZSAQ"
        assert copy.deepcopy(PeftType.OPTIMUM_ZSAQ) is PeftType.OPTIMUM_ZSAQ

    def test_the_lazy_name_is_the_class(self):
        from optimum_zsaq.integrations import peft

        assert optimum_zsaq.OutlierConfig is peft.OutlierConfig

    def test_any_auto_class_finds_model_and_adapter(self, tmp_path):
        make("bert").save_pretrained(tmp_path / "base")
        model = randomized(
            get_peft_model(
                tf.BertModel.from_pretrained(tmp_path / "base"),
                OutlierConfig(task_type="FEATURE_EXTRACTION", fraction=0.03),
            )
        )
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")), logits(model))
