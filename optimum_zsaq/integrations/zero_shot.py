"""Zero-shot training of transformers' models (ZSAQ): the parts that `from_pretrained` and `ZSAQTrainer` put together."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.compensation import compensate
from ..algorithms.generators import Batch, Generator, PriorSource, SequenceForm, Source, token_prior
from ..algorithms.minimax import Minimax, MinimaxSettings, discrepancy
from ..surgery import pack, prepare
from .data import fitting_length, special_tokens, uncached_batch
from .recipe import calibrate_on_load
from .state import TrainingState
from .writing import answer_inputs, tokenizer_or_none, write_continuations, write_texts
from .zsaq import SHORTEST, ZSAQConfig


_LONGEST_WRITTEN, _LONGEST = 128, 32  # tokens of a sequence, of decoders and of other models: our choice
_START_BATCH = 64  # sequences run together when errors are compensated
_HELD_OUT = 8  # batches that D is measured on, before and after
_SAVED_EVERY = 25  # steps


def writes_text(model: PreTrainedModel) -> bool:
    """Whether a model is a decoder that can write its own sequences."""
    return model.can_generate() and not model.config.is_encoder_decoder


def longest_sequence(config: ZSAQConfig, model: PreTrainedModel) -> int:
    """Tokens of the longest sequence that a model is trained on."""
    usual = _LONGEST_WRITTEN if writes_text(model) else _LONGEST
    return config.sequence_length or fitting_length(model, usual)


def sized(config: ZSAQConfig, model: PreTrainedModel) -> ZSAQConfig:
    """A copy of a config whose counts of sequences are all set, for this model."""
    return config.sized(longest_sequence(config, model))


def make_generator(teacher: PreTrainedModel, config: ZSAQConfig) -> Generator:
    """The generator that a config asks for; what has to be written is written now, with a progress bar.

    Raises:
        ValueError: "teacher" for a model that writes nothing; see `writing.py`.
    """
    config = sized(config, teacher)
    first, last, special, _ = special_tokens(teacher, tokenizer_or_none(teacher))
    longest = longest_sequence(config, teacher)
    shortest = longest if writes_text(teacher) else min(longest, max(SHORTEST, len(first) + len(last) + 1))
    form = SequenceForm(first, last, shortest, longest)
    table = teacher.get_input_embeddings().weight
    prior = token_prior(table, special)
    with _progress(config.written_sequences, "Writing sequences", "sequence") as watch:
        source = _source(teacher, config, form, prior, watch)
    return Generator(source, table, prior, form, seed=config.seed)


def _source(
    teacher: PreTrainedModel, config: ZSAQConfig, form: SequenceForm, prior: Tensor, watch: Callable[[int], Any]
) -> Source:
    name, count, seed = config.generator, config.written_sequences, config.seed
    own = teacher.can_generate()
    if name == "noise" or (name == "auto" and not own):
        return PriorSource(prior)
    if isinstance(name, Source):
        return name
    if name not in ("auto", "teacher"):
        return write_texts(name, teacher, form, count, seed, watch)
    if not own:
        raise ValueError(
            f"generator='teacher' needs a model that writes, and this is a {type(teacher).__name__}; "
            "use generator='noise' or a causal language model"
        )
    if teacher.config.is_encoder_decoder:
        return answer_inputs(teacher, prior, form, count, seed, watch)
    return write_continuations(teacher, form, count, seed, watch)


def make_minimax(
    teacher: PreTrainedModel, student: PreTrainedModel, generator: Generator, settings: MinimaxSettings
) -> Minimax:
    """The training of a transformers' model: D of its kind of output, its own embeddings, its decoder's inputs."""
    settings = replace(settings, output="mse" if is_regression(student) else "kl")
    return Minimax(teacher, student, generator, settings, _embed, lambda batch: uncached_batch(student, batch))


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matmuls that `ZSAQConfig(autocast=...)` means on a device; None: that of the weights."""
    if name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
        name = "bfloat16" if fast else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


@torch.enable_grad()
def train_on_load(model: PreTrainedModel, config: ZSAQConfig) -> dict[str, Any]:
    """Make a float model that was just loaded into a trained low-bit one, in place.

    Returns:
        `dict`: what the data was (kind, count, seed), how long it took, and what it won: see `measure`.

    Raises:
        ValueError: weights that were not in the checkpoint: an untrained head has no answers to learn.
        FloatingPointError: see `Minimax.step`.
    """
    check_all_read(model, "ZSAQ")
    started, packed = time.perf_counter(), config.packed  # `prepare` notes in the config what the model is now
    config = sized(config, model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    run = start_run(model, config)
    held_out = [run.complete(run.generator.sample(config.batch_size)) for _ in range(_HELD_OUT)]
    state = TrainingState(config, run)
    won = state.load() or find_start(run, config, held_out)
    with tqdm(total=config.steps, initial=run.done, desc="Training without data", unit="step", leave=False) as bar:
        while run.done < config.steps:
            loss = run.step()["loss"]
            run.update()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if run.done % _SAVED_EVERY == 0:
                state.save(won)
    won["trained"] = measure(run, held_out)
    state.remove()
    finish_training(model, packed, dtypes)
    count, seconds = config.steps * config.batch_size, time.perf_counter() - started
    return {"kind": "generated token sequences", "count": count, "seed": config.seed, "seconds": round(seconds), "won": won}


def finish_training(model: PreTrainedModel, packed: bool, dtypes: dict[str, torch.dtype]) -> None:
    """Pack a trained student if its config says so, and give what stays float its dtype back, by name, in place."""
    model.zero_grad(set_to_none=True)
    if packed:
        pack(model)
    for name, p in model.named_parameters():
        if p.is_floating_point() and name in dtypes and not name.endswith("_scale"):
            p.data = p.data.to(dtypes[name])


def start_run(model: PreTrainedModel, config: ZSAQConfig) -> Minimax:
    """Teacher, generator and training of a float model, which becomes the student, rounded, in place."""
    for p in model.parameters():
        p.data = p.data.float()
    teacher = copy.deepcopy(model)
    prepare(model, config.scheme(), config.ranges)
    calibrate_on_load(model, config)
    generator = make_generator(teacher, config)
    settings = replace(config.settings(), autocast=autocast_dtype(config.autocast, model.device))
    run = make_minimax(teacher, model, generator, settings)
    return run


def find_start(run: Minimax, config: ZSAQConfig, held_out: list[Batch]) -> dict[str, dict[str, float]]:
    """Compensate the errors of a rounded student, in place, if the config says so; with a progress bar.

    Returns:
        `dict`: what was measured of it "rounded" and "compensated".
    """
    won = {"rounded": measure(run, held_out)}
    if config.start == "compensated":
        size = min(_START_BATCH, config.start_sequences)
        batches = [run.complete(run.generator.sample(size)) for _ in range(-(-config.start_sequences // size))]
        with _progress(100, "Compensating errors", "%") as watch:
            compensate(run.teacher, run.student, batches, watch=_in_percent(watch))
        won["compensated"] = measure(run, held_out)
    return won


def _in_percent(watch: Callable[[int], Any]) -> Callable[[str, float], None]:
    seen = 0

    def report(_: str, share: float) -> None:
        nonlocal seen
        watch(int(100 * share) - seen)
        seen = int(100 * share)

    return report


@torch.no_grad()
def measure(run: Minimax, batches: list[Batch]) -> dict[str, float]:
    """How far the student is from its teacher on some batches.

    Returns:
        `dict`: "discrepancy", D; of a model with outputs "output", D of these alone, and where they are classes or tokens
        also "agreement", the share of equal answers.
    """
    alone = replace(run.settings, output_weight=1.0, hidden_weight=0.0)
    found: dict[str, float] = Counter()
    for batch in batches:
        outputs = [model(**batch, output_hidden_states=True) for model in (run.teacher, run.student)]
        found["discrepancy"] += discrepancy(*outputs, batch, run.settings).item() / len(batches)
        if getattr(outputs[1], "logits", None) is None:
            continue
        found["output"] += discrepancy(*outputs, batch, alone).item() / len(batches)
        if alone.output == "kl":
            teacher, student = (output.logits.argmax(dim=-1) for output in outputs)
            found["agreement"] += (teacher == student).float().mean().item() / len(batches)
    return dict(found)


def won_lines(data: dict[str, Any]) -> list[str]:
    """What a finished run tells its user, three lines, from what `train_on_load` returned."""
    won = data["won"]

    def series(figure: str, form: Callable[[float], str]) -> str:
        return ", ".join(f"{form(found[figure])} {stage}" for stage, found in won.items())

    removed = 1.0 - won["trained"]["discrepancy"] / won["rounded"]["discrepancy"]
    lines = [
        f"distance from the float model: {series('discrepancy', lambda d: f'{d:.4f}')} ({100 * removed:.0f} % removed)",
        f"{data['count']:,} generated sequences, {data['seconds']} s; both figures on held-out generated inputs",
    ]
    if "agreement" in won["trained"]:
        lines.insert(1, f"answers like the float model's: {series('agreement', lambda a: f'{100 * a:.1f} %')}")
    return lines


@contextmanager
def _progress(total: int, title: str, unit: str) -> Iterator[Callable[[int], Any]]:
    with tqdm(total=total, desc=title, unit=unit, leave=False) as bar:
        yield bar.update


def check_all_read(model: PreTrainedModel, method: str) -> None:
    """Refuse to learn the answers of an untrained head.

    Raises:
        ValueError: weights that were not in the checkpoint.
    """
    new = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    if new:
        raise ValueError(
            f"the checkpoint has no {new[:3]}: {method} trains against the float model's answers, which an untrained head "
            "does not have; fine-tune the float model first, or load it without that head (AutoModel)"
        )


def is_regression(model: PreTrainedModel) -> bool:
    """Whether a model's outputs are numbers, not classes or tokens."""
    one = type(model).__name__.endswith("SequenceClassification") and model.config.num_labels == 1
    return one or model.config.problem_type == "regression"


def _embed(model: nn.Module, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)
