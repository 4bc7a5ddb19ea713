"""Training of the study `adapters`: one loop for every method, and its search for a learning rate."""

import copy
import time
from collections.abc import Iterator
from typing import Any


HEAD_RATE = 3e-3


def trainable(model: Any) -> list[Any]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Any, samples: Any, rate: float, steps: int, seed: int, size: int) -> float:
    """AdamW without decay of weights, 6 % warm-up, then linearly to zero, matrix products in bfloat16.

    `samples` has `batches(size, generator)`. Returns the seconds of the CPU.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(_groups(model, rate), weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    begun = time.process_time()
    for _, batch in zip(range(steps), _forever(samples, size, generator), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            batch_loss = model(**batch).loss
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.process_time() - begun


def _groups(model: Any, rate: float) -> list[dict[str, Any]]:
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = [parameter for name, parameter in own.items() if "classifier" in name]
    others = [parameter for name, parameter in own.items() if "classifier" not in name]
    tunes_few = others and any(not parameter.requires_grad for parameter in model.parameters())
    return [{"params": others, "lr": rate}, {"params": heads, "lr": HEAD_RATE if tunes_few else rate}]


def _forever(samples: Any, size: int, generator: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from samples.batches(size, generator)


def loss(model: Any, samples: Any, size: int) -> float:
    """Mean over samples of the model's loss, by batches."""
    import torch

    with torch.inference_mode():
        parts = [(model(**batch).loss.item(), len(batch["labels"])) for batch in samples.batches(size)]
    return sum(value * count for value, count in parts) / sum(count for _, count in parts)


def search(
    start: Any, rates: tuple[float, ...], parts: tuple[Any, Any], steps: int, seed: int, size: int
) -> dict[str, float]:
    """The loss on the second part after a few steps on the first with each learning rate."""
    found = {}
    for rate in rates:
        model = copy.deepcopy(start)
        train(model, parts[0], rate, steps, seed, size)
        found[str(rate)] = loss(model, parts[1], size)
    return found
