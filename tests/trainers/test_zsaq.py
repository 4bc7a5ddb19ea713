"""ZSAQTrainer: `Minimax` under transformers' loop, in parts, on two processes, interrupted and resumed, saved packed."""

import copy
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits, make, token_ids
from tolerances import relative_error
from torch import nn
from trainers.processes import command, finish, kill_after_a_checkpoint
from trainers.zsaq_run import PLAIN, SHARP, models, tiny_generator, trainer
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from optimum_zsaq import ZSAQArguments, ZSAQConfig, ZSAQTrainer, pack
from optimum_zsaq.algorithms.minimax import MinimaxSettings
from optimum_zsaq.integrations.zero_shot import make_minimax
from optimum_zsaq.layers import PackedEmbedding, PackedLinear
from optimum_zsaq.surgery import low_bit_layers


SCRIPT = Path(__file__).with_name("zsaq_run.py")
script = partial(command, SCRIPT)
ELSEWHERE = (
    1e-4  # of what six steps changed: float32 sums in another order, which AdamW makes larger where gradients are small
)
SAVED = {"save_strategy": "steps", "save_steps": 2}


def states(run: ZSAQTrainer) -> dict[str, torch.Tensor]:
    generator = {f"generator.{name}": value for name, value in run.minimax.generator.state_dict().items()}
    return {**run.model.state_dict(), **generator}


def different(found: dict, expected: dict) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def assert_same_movement(found: dict, expected: dict, start: dict) -> None:
    """Equal up to the order of sums; but a key's bias adds the same to all scores of a query: its gradient is noise."""
    moved = 0
    for name, value in expected.items():
        if value.is_floating_point() and not name.endswith("key.bias") and not torch.equal(value, start[name]):
            moved += 1
            assert relative_error(found[name] - start[name], value - start[name]) < ELSEWHERE, name
    assert moved > 20


def losses(run: ZSAQTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


class TestTheSteps:
    def test_are_those_of_minimax(self, tmp_path):
        """Driven by hand: same seeds, same schedule, same clipping."""
        run = trainer(tmp_path, **SHARP)
        teacher, student = models()
        settings = MinimaxSettings(
            6, 4, 1e-3, 3e-4, generator_every=2, generator_learning_rate=0.02, sharpness=run.minimax.settings.sharpness
        )
        other = make_minimax(teacher, student, tiny_generator(teacher), settings)
        schedule = get_cosine_schedule_with_warmup(other.optimizer, 1, 6)
        figures = []
        for _ in range(6):
            figures.append(other.step())
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            other.optimizer.step()
            schedule.step()
        run.train()
        assert different(run.model.state_dict(), student.state_dict()) == []
        assert different(run.minimax.generator.state_dict(), other.generator.state_dict()) == []
        logged = [{name: entry[name] for name in figure} for entry, figure in zip(losses(run), figures, strict=True)]
        assert logged == [pytest.approx(figure, rel=1e-6) for figure in figures]
        assert ["ascent" in entry for entry in losses(run)] == [False, False, True, False, True, False]
        assert run.minimax.done == run.state.global_step == 6

    def test_in_two_parts_are_those_of_the_whole_batch(self, tmp_path):
        whole = trainer(tmp_path, rho=0.05, per_device_train_batch_size=8, logging_steps=3)
        start = copy.deepcopy(whole.model.state_dict())
        whole.train()
        parts = trainer(tmp_path, rho=0.05, gradient_accumulation_steps=2, logging_steps=3)
        parts.train()
        assert_same_movement(parts.model.state_dict(), whole.model.state_dict(), start)
        for one, other in zip(losses(parts), losses(whole), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["sharp_loss"] == pytest.approx(other["sharp_loss"], rel=1e-5)
        assert parts.state.log_history[-1]["train_loss"] == pytest.approx(
            whole.state.log_history[-1]["train_loss"], rel=1e-5
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("parts", [1, 2])
    def test_on_two_processes_are_those_of_one(self, tmp_path, parts):
        """DDP on gloo, with SAM; with the generator's ascent where a process runs its batch at once."""
        options = SHARP if parts == 1 else {"rho": 0.05, "output_weight": 1.0}
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        finish(script(tmp_path, tmp_path / "out.pt", launcher, **options, gradient_accumulation_steps=parts))
        found = torch.load(tmp_path / "out.pt")
        assert found["world"] == 2
        run = trainer(tmp_path / "one", per_device_train_batch_size=8 * parts, **options)
        start = copy.deepcopy(run.model.state_dict())
        generator = copy.deepcopy(run.minimax.generator.state_dict())
        run.train()
        assert_same_movement(found["student"], run.model.state_dict(), start)
        for name, value in run.minimax.generator.state_dict().items():
            if name == "_extra_state":
                assert torch.equal(found["generator"][name], value)
            elif "generator_every" in options:
                change = value - generator[name]
                assert relative_error(found["generator"][name] - generator[name], change) < ELSEWHERE, name
        for one, other in zip(found["figures"], losses(run), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert packed_layers(tmp_path / "packed", run.model)

    def test_train_it_and_keep_step_sizes_positive(self, tmp_path):
        run = trainer(tmp_path, max_steps=40, scale_learning_rate=0.5, logging_steps=10)
        teacher = copy.deepcopy(run.minimax.teacher.state_dict())
        run.train()
        assert all((scale > 0).all() for scale in run.minimax.scales)
        assert different(run.minimax.teacher.state_dict(), teacher) == []
        run = trainer(tmp_path, max_steps=40, logging_steps=10)
        run.train()
        assert losses(run)[-1]["loss"] < 0.8 * losses(run)[0]["loss"]
        assert not run.model.training

    @pytest.mark.parametrize("name", ["bert", "bert-cls", "llama-tied", "t5-tied"])
    def test_of_every_kind_of_model(self, name, tmp_path):
        """With the generator that "auto" makes: of noise, of written sequences, of answers."""
        teacher, student = models(name)
        args = ZSAQArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, warmup_steps=0, sequence_length=8,
            written_sequences=16, **PLAIN,
        )  # fmt: skip
        before = copy.deepcopy(student.state_dict())
        run = ZSAQTrainer(student, args, teacher=teacher)
        run.train()
        assert len(different(student.state_dict(), before)) > 10
        assert all(entry["loss"] > 0 for entry in losses(run))

    def test_in_bfloat16_are_near_those_in_float32(self, tmp_path):
        exact, fast = trainer(tmp_path, **SHARP), trainer(tmp_path, bf16=True, **SAVED, **SHARP)
        seen = {}

        def note(name: str):
            return lambda _, __, output: seen.setdefault(name, set()).add(output.dtype)

        for name, model in (("student", fast.model), ("teacher", fast.minimax.teacher)):
            model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(note(name))
        exact.train()
        fast.train()
        assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
        assert {p.dtype for p in fast.minimax.trained} == {torch.float32}
        assert losses(fast)[-1]["loss"] == pytest.approx(losses(exact)[-1]["loss"], rel=0.1)
        assert losses(fast)[-1]["loss"] != losses(exact)[-1]["loss"]
        fast.save_model(str(tmp_path / "packed"))
        assert packed_layers(tmp_path / "packed", fast.accelerator.unwrap_model(fast.model, keep_fp32_wrapper=False))

    def test_go_on_after_a_second_call_of_train(self, tmp_path):
        run = trainer(tmp_path, sharp_from=0.5, rho=0.05)
        for _ in range(2):
            run.train()
            assert ["sharp_loss" in entry for entry in losses(run)] == [False] * 3 + [True] * 3
            assert run.minimax.done == 6

    def test_stop_at_a_loss_that_is_not_finite(self, tmp_path):
        run = trainer(tmp_path, **SAVED)

        def spoil(*_):
            if run.state.global_step == 3:
                run.minimax.teacher.get_parameter("bert.encoder.layer.0.output.dense.bias").data.fill_(torch.nan)

        run.model.register_forward_pre_hook(spoil)
        run.minimax.teacher.register_forward_pre_hook(spoil)
        with pytest.raises(FloatingPointError, match="became nan at step 4 of 6; the weights are those of step 3"):
            run.train()
        again = trainer(tmp_path, **SAVED)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 6


class TestTheOptimizer:
    def test_has_groups_of_weights_and_step_sizes(self, tmp_path):
        run = trainer(tmp_path, weight_decay=0.1)
        decayed, kept, scales = run.create_optimizer().param_groups
        names = {id(p): name for name, p in run.model.named_parameters()}
        assert [group["lr"] for group in (decayed, kept, scales)] == [1e-3, 1e-3, 3e-4]
        assert [group["weight_decay"] for group in (decayed, kept, scales)] == [0.1, 0.0, 0.0]
        assert all(names[id(p)].endswith("weight") for p in decayed["params"])
        assert all(re.search("bias|LayerNorm", names[id(p)]) for p in kept["params"])
        assert {id(p) for p in scales["params"]} == {id(p) for p in run.minimax.scales}
        trained = [p for group in (decayed, kept, scales) for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in run.minimax.trained}

    def test_of_the_user_is_taken(self, tmp_path):
        teacher, student = models()
        optimizer = torch.optim.SGD(student.parameters(), lr=1e4)
        args = ZSAQArguments(str(tmp_path), max_steps=2, lr_scheduler_type="constant", warmup_steps=0, **PLAIN)
        run = ZSAQTrainer(student, args, teacher=teacher, generator=tiny_generator(teacher), optimizers=(optimizer, None))
        before = student.bert.pooler.dense.weight.clone()
        run.train()
        assert run.optimizer.optimizer is optimizer
        assert all((scale > 0).all() for scale in run.minimax.scales)
        assert torch.equal(before, student.bert.pooler.dense.weight)  # no gradient: only hidden states count

    def test_with_groups_of_its_own_is_refused(self, tmp_path):
        run = trainer(tmp_path)
        run.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1, "params": []})
        with pytest.raises(ValueError, match="optim=.* does not go with ZSAQTrainer; use optim='adamw_torch'"):
            run.train()


class TestResuming:
    def test_is_exact(self, tmp_path):
        options = {**SHARP, **SAVED, "gradient_accumulation_steps": 2}
        whole = trainer(tmp_path, **options)
        whole.train()
        for step in (2, 4):
            teacher, student = models()
            for p in student.parameters():
                if p.is_floating_point():
                    p.data.mul_(1.1)
            resumed = trainer(tmp_path / "again", student=student, teacher=teacher, **options)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert different(states(resumed), states(whole)) == []
            assert losses(resumed) == losses(whole)

    @pytest.mark.slow
    def test_is_exact_after_a_kill(self, tmp_path):
        """SIGKILL between two steps or wherever it hits, in the middle of training; another process goes on."""
        options = {**SHARP, **SAVED}
        finish(script(tmp_path / "whole", tmp_path / "whole.pt", **options))
        folder, out = tmp_path / "killed", tmp_path / "killed.pt"
        kill_after_a_checkpoint(script(folder, out, slow=True, **options), folder, tmp_path / "log")
        assert not out.exists()
        finish(script(folder, out, resume=True, **options))
        found, expected = torch.load(out), torch.load(tmp_path / "whole.pt")
        assert different(found["student"], expected["student"]) == []
        assert different(found["generator"], expected["generator"]) == []
        assert found["figures"] == expected["figures"]

    def test_of_an_interrupted_checkpoint_is_refused(self, tmp_path):
        trainer(tmp_path, max_steps=2, **SAVED).train()
        (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
        with pytest.raises(ValueError, match="checkpoint-2 has no trainer_state.json.*resume from the one before"):
            trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_of_weights_alone_is_said(self, tmp_path, caplog):
        trainer(tmp_path, max_steps=2, save_only_model=True, **SAVED).train()
        run = trainer(tmp_path, max_steps=3, generator_every=1)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert "checkpoint-2 has no minimax.pt: the generator starts anew" in caplog.text
        assert run.minimax.done == 3


def packed_layers(folder: Path, model) -> int:
    """How many layers of a saved model are packed, all of them; its answers are those of `model`."""
    reloaded = type(model).from_pretrained(folder)
    layers = [layer for _, layer in low_bit_layers(reloaded)]
    assert all(isinstance(layer, PackedLinear | PackedEmbedding) for layer in layers)
    assert torch.equal(logits(reloaded), logits(pack(copy.deepcopy(model))))
    return len(layers)


class TestSaving:
    def test_a_user_gets_the_packed_model_and_training_goes_on(self, tmp_path):
        run = trainer(tmp_path, **SAVED)
        run.train()
        before = copy.deepcopy(run.model.state_dict())
        run.save_model(str(tmp_path / "out"))
        assert packed_layers(tmp_path / "out", run.model) > 10
        assert different(run.model.state_dict(), before) == []
        assert run.model is run.minimax.student
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["packed"] is True
        assert config["recipe"]["training"] == {"trainer": "ZSAQTrainer", "steps": 6, "seed": 42}
        assert run.model.config.quantization_config.packed is False
        run.save_model()
        assert packed_layers(tmp_path, run.model) > 10
        run.train()
        assert len(different(run.model.state_dict(), before)) > 10

    def test_checkpoints_keep_the_float_weights(self, tmp_path):
        run = trainer(tmp_path, **SAVED)
        run.train()
        stored = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        assert all(torch.equal(stored[name], p) for name, p in run.model.named_parameters())
        config = json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())["quantization_config"]
        assert config["packed"] is False

    def test_what_is_pushed_is_packed_with_its_own_card(self, tmp_path, monkeypatch):
        """`push_to_hub` writes to `output_dir` and uploads that."""
        run, sent = trainer(tmp_path), {}

        class Hub:
            def upload_folder(self, folder_path, **_):
                sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

        monkeypatch.setattr("transformers.trainer.hf_api", Hub)
        run.hub_model_id = "me/model"
        run.push_to_hub()
        assert packed_layers(tmp_path, run.model) > 10
        assert b"written by optimum-zsaq" in sent["README.md"]
        assert json.loads(sent["config.json"])["quantization_config"]["packed"] is True

    def test_the_card_is_the_trainers_where_nothing_was_saved(self, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(Trainer, "create_model_card", lambda self, **options: made.append(options))
        trainer(tmp_path / "new").create_model_card(language="en")
        assert made == [{"language": "en"}]

    def test_a_model_that_was_packed_by_hand_is_saved_as_it_is(self, tmp_path):
        run = trainer(tmp_path)
        pack(run.model)
        run.save_model(str(tmp_path / "out"))
        assert packed_layers(tmp_path / "out", run.model) > 10


def test_evaluation_is_the_trainers(tmp_path):
    teacher, student = models()
    args = ZSAQArguments(str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, **PLAIN)
    samples = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(token_ids(8, 7))]
    run = ZSAQTrainer(
        student,
        args,
        teacher=teacher,
        generator=tiny_generator(teacher),
        eval_dataset=samples,
        compute_metrics=lambda found: {"count": len(found.label_ids)},
    )
    run.train()
    assert [entry["eval_count"] for entry in run.state.log_history if "eval_count" in entry] == [8, 8]


class TestArguments:
    def test_defaults_are_the_configs(self, tmp_path):
        args, config = ZSAQArguments(str(tmp_path)), ZSAQConfig(weight_bits=3)
        assert args.settings() == config.settings()
        assert args.get_warmup_steps(300) == 30
        assert args.lr_scheduler_type == "cosine"

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"max_steps": -1}, f"max_steps=-1 is no count, .* has no epochs; use max_steps={ZSAQConfig().steps}"),
            ({"rho": -0.1}, "rho=-0.1 is no radius; use a number of at least 0"),
            ({"perturb": "all"}, "perturb='all' is unknown"),
            ({"scale_learning_rate": 0.0}, "scale_learning_rate=0.0 is not allowed"),
            ({"generator_every": -1}, "generator_every=-1 is no count"),
            ({"hidden_weight": 0.0}, "nothing to learn from"),
            ({"sharp_from": 2.0}, "sharp_from=2.0 is no share"),
            ({"sequence_length": 2}, "sequence_length=2 is too short"),
            ({"written_sequences": 0}, "written_sequences=0 is no count"),
        ],
        ids=lambda v: str(v)[:30],
    )
    def test_bad_values(self, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            ZSAQArguments(str(tmp_path), **fields)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("deepspeed", {"zero_optimization": {"stage": 2}}),
            ("fsdp", True),
            ("auto_find_batch_size", True),
            ("activation_checkpointing", True),
            ("gradient_checkpointing", True),
        ],
    )
    def test_that_cannot_be_followed(self, tmp_path, name, value):
        teacher, student = models()
        args = ZSAQArguments(str(tmp_path), **PLAIN)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=f"{name}=.* does not go with ZSAQTrainer; leave it out"):
            ZSAQTrainer(student, args, teacher=teacher)

    def test_float16(self, tmp_path):
        teacher, student = models()
        args = ZSAQArguments(str(tmp_path), **PLAIN)
        args.fp16 = True
        with pytest.raises(ValueError, match="fp16=True does not go with ZSAQTrainer; use bf16=True"):
            ZSAQTrainer(student, args, teacher=teacher)

    def test_sharding_that_the_launcher_asks_for(self, tmp_path, monkeypatch):
        teacher, student = models()
        monkeypatch.setattr(ZSAQTrainer, "is_deepspeed_enabled", True, raising=False)
        monkeypatch.setattr(Trainer, "__init__", lambda self, *_, **__: None)
        with pytest.raises(ValueError, match="DeepSpeed or FSDP, asked for by the launcher, does not go with ZSAQTrainer"):
            ZSAQTrainer(student, ZSAQArguments(str(tmp_path), **PLAIN), teacher=teacher)

    @pytest.mark.parametrize("name", ["train_dataset", "compute_loss_func", "model_init"])
    def test_data_of_ones_own(self, tmp_path, name):
        teacher, student = models()
        with pytest.raises(ValueError, match=f"{name}= does not go with ZSAQTrainer; leave it out: the data is generated"):
            ZSAQTrainer(student, ZSAQArguments(str(tmp_path), **PLAIN), teacher=teacher, **{name: [1]})

    def test_of_the_stock_trainer(self, tmp_path):
        teacher, student = models()
        with pytest.raises(TypeError, match="args is a TrainingArguments; use ZSAQArguments"):
            ZSAQTrainer(student, TrainingArguments(str(tmp_path), use_cpu=True), teacher=teacher)


class TestBadModels:
    def refused(self, tmp_path, student, teacher, message):
        with pytest.raises(ValueError, match=message):
            ZSAQTrainer(student, ZSAQArguments(str(tmp_path), **PLAIN), teacher=teacher, generator="noise")

    def test_a_packed_student(self, tmp_path):
        teacher, student = models()
        self.refused(tmp_path, pack(student), teacher, r"the student is packed.*PreQuantConfig\(packed=False\)")

    def test_a_float_student(self, tmp_path):
        self.refused(tmp_path, make("bert-cls"), make("bert-cls"), "no fake-quantized layer to train; call prepare")

    def test_a_teacher_in_low_bits(self, tmp_path):
        _, student = models()
        self.refused(tmp_path, student, models()[1], "the teacher is in low bits; use the float model")

    def test_a_student_that_shares_weights_with_its_teacher(self, tmp_path):
        teacher, student = models()
        student.classifier.weight = teacher.classifier.weight
        self.refused(tmp_path, student, teacher, "teacher and student share weights")

    def test_a_student_in_bfloat16(self, tmp_path):
        teacher, student = models()
        student.classifier.bfloat16()
        self.refused(tmp_path, student, teacher, "weights of .'torch.bfloat16'.*load it with dtype=torch.float32")

    def test_a_sharded_student(self, tmp_path, monkeypatch):
        teacher, student = models()
        monkeypatch.setattr(type(student), "is_distributed_loading_by_transformers", True)
        self.refused(tmp_path, student, teacher, "a student that is sharded does not go with ZSAQTrainer")
