"""Zero-shot training of transformers' models (ZSAQ): the parts that `from_pretrained` and `ZSAQTrainer` put together."""

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.compensation import CompensationSettings, compensate
from ..algorithms.forms import InputMixture
from ..algorithms.generators import Generator, PriorSource, Source, WrittenSource
from ..algorithms.minimax import Minimax, MinimaxSettings
from ..algorithms.probes import UNWRITTEN, Guard, hold_out, make_probes
from ..surgery import pack, prepare
from .checkpoint import is_read
from .closing import ROUNDED, TRAINED
from .data import tokenizer_or_none, uncached_batch
from .forms import input_mixture, longest_sequence, make_inputs, vocabulary_prior, writes_text
from .recipe import calibrate_on_load, calibration_batches
from .rounding import SEQUENCES, SMOOTHED, check_finite, look_at_inputs
from .state import TrainingState
from .writing import AnsweredSource, answer_inputs, write_continuations, write_texts
from .zsaq import ZSAQConfig


_BATCH_TOKENS = 2**11  # of a step of a model that does not write, if all sequences were the longest: our choice
_SHOWN = 8  # sequences run together when inputs are measured
_START_BATCH = 64  # sequences run together when errors are compensated
_SAVED_EVERY = 25  # steps
CHECKED = 2  # times that the student is measured while it trains, the end included
_PROBE_SEED = 2**20  # added to the seed of training


def sized(config: ZSAQConfig, model: PreTrainedModel) -> ZSAQConfig:
    """A copy of a config whose values are set where they depend on this model."""
    tokens = {} if model.can_generate() else {"batch_tokens": _BATCH_TOKENS}
    return config.sized(longest_sequence(model, config.sequence_length), decoder=writes_text(model), **tokens)


def make_generator(teacher: PreTrainedModel, config: ZSAQConfig) -> Generator:
    """The generator that a config asks for; what has to be written is written now, with a progress bar.

    Raises:
        ValueError: "teacher" for a model that writes nothing; see `writing.py`.
    """
    config = sized(config, teacher)
    tokenizer = tokenizer_or_none(teacher)
    forms = input_mixture(teacher, tokenizer, longest_sequence(teacher, config.sequence_length))
    prior = vocabulary_prior(teacher, tokenizer)
    with _progress(config.written_sequences, "Writing sequences", "sequence") as watch:
        source = _source(teacher, config, forms, prior, watch)
    return make_inputs(teacher, source, prior, forms, config.seed)


def _source(
    teacher: PreTrainedModel, config: ZSAQConfig, forms: InputMixture, prior: Tensor, watch: Callable[[int], Any]
) -> Source:
    name, count, seed = config.generator, config.written_sequences, config.seed
    form = forms.forms[0]
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
    fewer = not settings.output_weight and "logits_to_keep" in inspect.signature(type(student).forward).parameters
    options = {"logits_to_keep": 1} if fewer else {}  # those of a large vocabulary cost more than a block
    return Minimax(teacher, student, generator, settings, _embed, lambda batch: uncached_batch(student, batch), options)


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
        `dict`: what the data was (kind, count, seed, inputs), how long it took, which state was kept, what each state was
        measured to be on each probe, and where it is worse than rounding; see `Guard`.

    Raises:
        ValueError: weights that were not in the checkpoint: an untrained head has no answers to learn.
        FloatingPointError: see `Minimax.step`; with `guard=False` alone.
    """
    check_all_read(model, "ZSAQ")
    started, packed = time.perf_counter(), config.packed  # `prepare` notes in the config what the model is now
    config = sized(config, model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    run, guard = start_run(model, config)
    state = TrainingState(config, run)
    kept = state.load()
    if kept is None:
        find_start(run, guard, config)
    else:
        guard.load_state_dict(kept)
    stopped = _train(run, guard, config, state)
    stage = guard.restore() if config.guard else TRAINED
    state.remove()
    finish_training(model, packed, dtypes)
    found = {
        "kind": "generated token sequences",
        "count": run.done * config.batch_size,
        "seed": config.seed,
        "seconds": round(time.perf_counter() - started),
        "kept": stage,
        "inputs": run.generator.forms.describe(),
        "won": {s: {name: f.means() for name, f in found.items()} for s, found in guard.measured.items()},
        "worse": guard.worse,
    }
    return {**found, "stopped": stopped} if stopped else found


def _train(run: Minimax, guard: Guard, config: ZSAQConfig, state: TrainingState) -> str:
    """All steps that are left, with a progress bar; tells why it ended early, if it did.

    Raises:
        FloatingPointError: see `Minimax.step`, where no guard has another state.
    """
    checks = {round(config.steps * (i + 1) / CHECKED) for i in range(CHECKED - 1)} if config.guard else set()
    with tqdm(total=config.steps, initial=run.done, desc="Training without data", unit="step", leave=False) as bar:
        while run.done < config.steps:
            try:
                loss = run.step()["loss"]
            except FloatingPointError as error:
                if not config.guard:
                    raise
                return str(error)
            run.update()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if run.done in checks:
                guard.measure(f"step {run.done}")
            if config.state is not None and run.done % _SAVED_EVERY == 0 and run.done < config.steps:
                state.save(guard.state_dict())
    guard.measure(TRAINED)
    return ""


def keep_block_inputs(model: PreTrainedModel) -> None:
    """Keep of each block its input alone for the backward pass, which runs the block again: less memory, more time.

    `finish_training` ends it.
    """
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What transformers says may run twice."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # half imported while we register with transformers

    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def finish_training(model: PreTrainedModel, packed: bool, dtypes: dict[str, torch.dtype]) -> None:
    """Pack a trained student if its config says so, and give what stays float its dtype back, by name, in place."""
    model.zero_grad(set_to_none=True)
    for block in _blocks(model):
        block.__dict__.pop("forward", None)
    if packed:
        pack(model)
    for name, p in model.named_parameters():
        if p.is_floating_point() and name in dtypes and not name.endswith("_scale"):
            p.data = p.data.to(dtypes[name])


def start_run(model: PreTrainedModel, config: ZSAQConfig) -> tuple[Minimax, Guard]:
    """The training of a float model, which becomes the student, rounded, in place; and what watches over it."""
    check_finite(model)
    for p in model.parameters():
        p.data = p.data.float()
    teacher = copy.deepcopy(model)
    generator = make_generator(teacher, config)
    scheme, smoothed = config.scheme(model), config.smoothing_for(model)
    count = SMOOTHED if smoothed else SEQUENCES
    shown = (uncached_batch(teacher, generator.sample(_SHOWN)) for _ in range(count // _SHOWN))
    energies = look_at_inputs(teacher, scheme, config, shown, count)
    if smoothed:
        model.load_state_dict(teacher.state_dict())
    prepare(model, scheme, config.ranges_for(model), energies)
    if config.activations == "static":
        calibrate_on_load(model, config, calibration_batches(teacher, config)[0])
    settings = replace(config.settings(), autocast=autocast_dtype(config.autocast, model.device))
    generator.source, other = hold_out(generator.source)
    run = make_minimax(teacher, model, generator, settings)
    if model.can_generate():
        keep_block_inputs(model)
    below = UNWRITTEN if isinstance(other, PriorSource) else 1.0
    return run, Guard(run, make_probes(generator, other, config.seed + _PROBE_SEED), config.guard, below)


def find_start(run: Minimax, guard: Guard, config: ZSAQConfig) -> None:
    """Measure a rounded student, and compensate its errors, in place, if the config says so; with a progress bar."""
    guard.measure(ROUNDED)
    if chosen_start(run, config) == "compensated":
        size = min(_START_BATCH, config.start_sequences)
        batches = [run.complete(run.generator.sample(size)) for _ in range(-(-config.start_sequences // size))]
        with _progress(100, "Compensating errors", "%") as watch:
            settings = CompensationSettings(ranges=_start_ranges(run, config))
            compensate(run.teacher, run.student, batches, settings, _in_percent(watch))
        guard.measure("compensated")


def chosen_start(run: Minimax, config: ZSAQConfig) -> str:
    """What `start="auto"` means here: compensation fits to what it sees, so it needs sequences that were written."""
    if config.start != "auto":
        return config.start
    written = isinstance(run.generator.source, WrittenSource | AnsweredSource) and config.ranges != "ternary"
    return "compensated" if written else "rounding"


def _start_ranges(run: Minimax, config: ZSAQConfig) -> str | None:
    return "energy" if config.ranges_for(run.teacher) == "energy" else None


def _in_percent(watch: Callable[[int], Any]) -> Callable[[str, float], None]:
    seen = 0

    def report(_: str, share: float) -> None:
        nonlocal seen
        watch(int(100 * share) - seen)
        seen = int(100 * share)

    return report


@contextmanager
def _progress(total: int, title: str, unit: str) -> Iterator[Callable[[int], Any]]:
    with tqdm(total=total, desc=title, unit=unit, leave=False) as bar:
        yield bar.update


def check_all_read(model: PreTrainedModel, method: str) -> None:
    """Refuse to learn the answers of an untrained head.

    Raises:
        ValueError: weights that were not in the checkpoint.
    """
    new = [name for name, p in model.named_parameters() if not is_read(p)]
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
