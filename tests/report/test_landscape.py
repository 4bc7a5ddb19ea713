import pytest
import torch
from tiny_models import make, token_ids

from optimum_zsaq import PreQuantConfig, pack, prepare
from optimum_zsaq.report.landscape import draw_landscapes, loss_landscape
from optimum_zsaq.surgery import low_bit_layers


def student():
    return prepare(make("bert-cls"), PreQuantConfig(weight_bits=3, embedding_bits=3).scheme())


def loss(model, batch):
    return model(**batch).loss, len(batch["labels"])


BATCHES = [{"input_ids": token_ids(4, 7, seed), "labels": torch.tensor([0, 1, 2, 0])} for seed in (1, 2)]


def test_is_the_loss_at_each_point():
    """A corner, with directions drawn here: rows as long as the weights'."""
    model = student()
    found = loss_landscape(model, BATCHES, loss, reach=0.3, points=3, seed=5)
    assert found.positions == [-0.3, 0.0, 0.3]
    layers = [layer for _, layer in low_bit_layers(model)]
    assert all(layer.perturbation is None for layer in layers)
    generator = torch.Generator().manual_seed(5)
    drawn = [[torch.randn(layer.shape, generator=generator) for layer in layers] for _ in range(2)]
    for a, b in ((0, 2), (1, 1), (2, 1)):
        for i, layer in enumerate(layers):
            weight = layer.quantized_weight().detach()
            rows = [d[i] / d[i].norm(dim=1, keepdim=True) * weight.norm(dim=1, keepdim=True) for d in drawn]
            layer.perturbation = found.positions[a] * rows[0] + found.positions[b] * rows[1]
        with torch.no_grad():
            expected = sum(loss(model.eval(), batch)[0].item() for batch in BATCHES) / 2
        for layer in layers:
            layer.perturbation = None
        assert found.losses[a][b] == pytest.approx(expected, rel=1e-5)


def test_of_a_packed_model_is_that_of_the_fake_quantized_one():
    found = [loss_landscape(model, BATCHES[:1], loss, points=3) for model in (student(), pack(student()))]
    for one, other in zip(found[0].losses, found[1].losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    found = loss_landscape(student(), BATCHES[:1], loss, points=3)
    draw_landscapes({"plain": found, "flat": found}, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reach": 0.0}, "reach=0.0 is not allowed"),
        ({"points": 4}, "points=4 has no middle"),
        ({"batches": []}, "nothing to measure on"),
    ],
    ids=str,
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        loss_landscape(student(), **{"batches": BATCHES, "loss": loss, **options})


def test_a_float_model():
    with pytest.raises(ValueError, match="no low-bit layer"):
        loss_landscape(make("bert-cls"), BATCHES, loss)
