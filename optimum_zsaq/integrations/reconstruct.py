"""Module-wise reconstruction of transformers' models (MREM): what `from_pretrained` puts together."""

import copy
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..algorithms.offload import OffloadedBlocks
from ..algorithms.parallel import ParallelReconstruction
from ..algorithms.pipeline import PipelineReconstruction
from ..algorithms.sequential import SequentialReconstruction
from ..algorithms.stages import Stage
from ..surgery import blocks, low_bit_layers, prepare
from .data import (
    Batch,
    describe_data,
    find_tokenizer,
    fitting_length,
    packed_batches,
    read_texts,
    text_batches,
    uncached_batch,
)
from .forms import missing_forms, writes_text
from .mrem import ZERO_SHOT, MREMConfig
from .recipe import find_input_ranges
from .rounding import look_at_inputs
from .state import PipelineState, TrainingState
from .zero_shot import (
    autocast_dtype,
    check_all_read,
    finish_training,
    make_generator,
)
from .zsaq import ZSAQConfig


logger = logging.getLogger(__name__)

Reconstruction = SequentialReconstruction | ParallelReconstruction

_STAGES = 4  # the paper's
_SHOWN = 2  # batches that the energies of inputs are measured on
_SAVED_EVERY = 25  # steps, of MREM-P
_TEXT_KEYS = {"text", "text_pair", "sentence"}


@torch.enable_grad()
def reconstruct_on_load(
    model: PreTrainedModel, config: MREMConfig, offloaded: OffloadedBlocks | None = None
) -> dict[str, Any]:
    """Make a float model that was just loaded into a trained low-bit one, in place.

    Args:
        model (`PreTrainedModel`): whose weights were read.
        config (`MREMConfig`): how.
        offloaded (`OffloadedBlocks`, *optional*): has the weights of the blocks, if the config asks for it.

    Returns:
        `dict`: what the data was (kind, count, hash), how long it took, and what it won: the error of each stage in the
        first and the last tenth of its steps.

    Raises:
        ValueError: no data, or data without texts that can be used; weights that were not in the checkpoint; more stages
            than blocks.
        FloatingPointError: see `StageTraining.step`.
    """
    check_all_read(model, "MREM")
    started, packed = time.perf_counter(), config.packed  # `prepare` notes in the config what the model is now
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data = p.data.float()
    config = config.sized(writes_text(model))
    batches, data = calibration_batches(model, config)
    with processes(model, config) as count:
        run = start_reconstruction(model, config, batches, count, offloaded)
        kept = {**data, "offloaded": offloaded.checksum} if offloaded else data
        state = (TrainingState if count == 1 else PipelineState)(config, run, kept)
        try:
            state.load()
            _train(run, state)
            run.finish()
            state.remove()
        except ConnectionError as error:
            raise ConnectionError(f"{error}; {state.kept()}") from error
        idle = run.agree(run.waited / run.trained) if isinstance(run, PipelineReconstruction) else None
    finish_training(model, packed, dtypes)
    won = {stage.title: _progress(losses) for stage, losses in zip(run.stages, run.losses, strict=True)}
    shares = {} if idle is None else {"idle": [round(share, 3) for share in idle]}
    return {**data, "seconds": round(time.perf_counter() - started, 1), **shares, "won": won}


@contextmanager
def processes(model: PreTrainedModel, config: MREMConfig) -> Iterator[int]:
    """How many processes share the training: those of torch.distributed, which torchrun's are made into for that long."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not config.parallel or not (launched or dist.is_initialized()):
        yield 1
        return
    own = not dist.is_initialized()
    if own:
        backend = "nccl" if model.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    try:
        yield dist.get_world_size()
    finally:
        if own:
            dist.destroy_process_group()


def start_reconstruction(
    model: PreTrainedModel,
    config: MREMConfig,
    batches: list[Batch],
    count: int = 1,
    offloaded: OffloadedBlocks | None = None,
) -> Reconstruction:
    """The run that a config asks for on `count` processes, of a float model, which becomes the student, in place."""
    found = blocks(model)
    # MREM-S runs a float stage for the last time before it is trained, so that its blocks need no copy
    shared = {} if config.parallel else {id(p): p for block in found.values() for p in block.parameters()}
    scheme, energies, ranges = config.scheme(model), None, config.ranges  # blocks on disk have ranges when they are read
    if not offloaded:
        shown = batches[:: max(1, len(batches) // _SHOWN)][:_SHOWN]
        ranges = config.ranges_for(model)
        energies = look_at_inputs(model, scheme, config, shown, sum(len(batch["input_ids"]) for batch in shown))
    teacher = copy.deepcopy(model, shared)
    prepare(model, scheme, ranges, energies)
    if any(m.spec.inputs and m.spec.inputs.granularity == "tensor" for _, m in low_bit_layers(model)):
        find_input_ranges(model, config, batches, batches)
    stages = config.stages or max(1, min(_STAGES, len(found)))
    settings = replace(
        config.settings(stages),
        autocast=autocast_dtype(config.autocast, model.device),
        start_ranges="energy" if config.ranges_for(model) == "energy" else None,
    )
    if count > 1:
        return PipelineReconstruction(teacher, model, batches, settings, config.timeout)
    if config.parallel:
        return ParallelReconstruction(teacher, model, batches, settings)
    return SequentialReconstruction(teacher, model, batches, settings, offloaded)


def _train(run: Reconstruction, state: TrainingState) -> None:
    """All steps that are left, with a progress bar a stage."""
    total = run.settings.steps
    bars: dict[Stage, Any] = {}
    before = zip(run.own_stages(), run.losses, strict=False)
    made: Counter[Stage] = Counter({stage: len(losses) for stage, losses in before})
    for stage, loss in run.steps():
        if stage not in bars:
            bars[stage] = tqdm(total=total, initial=made[stage], desc=stage.title.capitalize(), unit="step", leave=False)
        made[stage] += 1
        bars[stage].update()
        bars[stage].set_postfix(error=f"{loss:.4f}", refresh=False)
        if run.resumable and (made[stage] % _SAVED_EVERY == 0 or made[stage] == total):
            state.save({})
    for bar in bars.values():
        bar.close()


def _progress(losses: list[float]) -> dict[str, float]:
    part = max(1, len(losses) // 10)
    return {"first error": sum(losses[:part]) / part, "last error": sum(losses[-part:]) / part}


def won_lines(data: dict[str, Any]) -> list[str]:
    """What a finished run tells its user, from what `reconstruct_on_load` returned."""
    errors = [f"{s}: {found['first error']:.4f} to {found['last error']:.4f}" for s, found in data["won"].items()]
    return [
        f"error of each stage's outputs, relative, from the first steps to the last: {'; '.join(errors)}",
        f"{data['count']:,} sequences ({data['kind']}), {data['seconds']} s{_idle(data)}",
    ]


def _idle(data: dict[str, Any]) -> str:
    shares = [f"{100 * share:.0f} %" for share in data.get("idle", ())]
    return f"; processes waited {', '.join(shares)} of that time" if shares else ""


# Data ----------------------------------------------------------------------------------------------------------------


def calibration_batches(model: PreTrainedModel, config: MREMConfig) -> tuple[list[Batch], dict[str, Any]]:
    """The batches of a config's calibration data, and what it was: kind, count, hash or seed.

    Raises:
        ValueError: no data; no text; samples with labels; texts that are all longer than the model.
    """
    data, count = config.calibration_data, config.calibration_samples
    if data is None:
        raise ValueError(
            "MREM learns from texts and got no calibration_data; give MREMConfig(calibration_data=...) a list of strings, "
            f"a datasets.Dataset or a file, or {ZERO_SHOT!r} to have sequences generated"
        )
    if isinstance(data, str) and data == ZERO_SHOT:
        return _generated(model, config), {"kind": "generated token sequences", "count": count, "seed": config.seed}
    _check_no_labels(data)
    samples = read_texts(data, count)
    if writes_text(model):
        batches = packed_batches(model, samples, config.batch_size, fitting_length(model, config.sequence_length))
        return [uncached_batch(model, batch) for batch in batches], describe_data(data, count)
    samples.sort(key=lambda sample: len(sample["text"]) + len(sample.get("text_pair", "")))
    _check_length(model, samples[0])
    length = config.sequence_length
    batches = [uncached_batch(model, batch) for batch in text_batches(model, samples, count, config.batch_size, length)]
    _warn_of_missing(model, batches, length)
    return batches, describe_data(data, count)


def _generated(model: PreTrainedModel, config: MREMConfig) -> list[Batch]:
    count, size = config.calibration_samples, config.batch_size
    asked = ZSAQConfig(seed=config.seed, sequence_length=config.sequence_length, written_sequences=count)
    generator = make_generator(model, asked)
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return [uncached_batch(model, generator.sample(n)) for n in sizes]


def _warn_of_missing(model: PreTrainedModel, batches: list[Batch], length: int) -> None:
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    missing = missing_forms(model, find_tokenizer(model), rows, length)
    if missing:
        logger.warning(
            "calibration_data holds %s: there the model is not trained, and may get worse than by rounding",
            " and ".join(missing),
        )


def _check_length(model: PreTrainedModel, shortest: dict[str, str]) -> None:
    limit = fitting_length(model, sys.maxsize)
    found = len(find_tokenizer(model)(shortest["text"], shortest.get("text_pair"))["input_ids"])
    if found > limit:
        raise ValueError(
            f"every text of calibration_data is longer than the {limit} tokens that {type(model).__name__} has positions "
            f"for (the shortest has {found}), so it would never see one end; cut them into shorter ones"
        )


def _check_no_labels(data: Any) -> None:
    """Columns beside the text are what files have; a sample that was made by hand with a label is a misunderstanding."""
    if isinstance(data, list | tuple) and data and isinstance(data[0], dict):
        other = sorted(set(data[0]) - _TEXT_KEYS)
        if other:
            raise ValueError(
                f"calibration_data has samples with {other}, and MREM uses texts alone, no labels; "
                "leave everything but 'text' and 'text_pair' out"
            )
