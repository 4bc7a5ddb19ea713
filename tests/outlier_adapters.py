"""Outlier adapters on packed, fake-quantized and float bases, for the tests of `integrations/`."""

import torch
from tiny_models import inputs, make, quantized
from tolerances import KERNEL, relative_error

from optimum_zsaq import OutlierConfig
from optimum_zsaq.integrations.outlier_layer import BIASES, SCALES, VALUES, OutlierLinear


BASES = {
    "packed": {"outliers": 0.02},
    "packed-without": {},
    "fake": {"outliers": 0.02, "packed": False},
    "float": None,
}


def base_model(kind, name, folder):
    settings = BASES[kind]
    return make(name) if settings is None else quantized(name, folder, **settings)


def config(**options):
    return OutlierConfig(**{"fraction": 0.03, **options})


def randomized(model, seed=1, name="default"):
    """As trained: values of an adapter that change what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.endswith((f"{VALUES}.{name}", f"{BIASES}.{name}", f"{SCALES}.{name}")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def same(found, expected):
    """Equal but for the order of sums."""
    return relative_error(found, expected) <= KERNEL[torch.float32]


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, OutlierLinear)}


def train(model, steps=4, rate=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = model(**inputs(model))[0].float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.eval()
