"""Which channels can be divided, found by trying; the product stays the same."""

import pytest
import torch
from tiny_models import inputs, logits, make
from torch import nn

from optimum_zsaq.algorithms.energy import input_energies
from optimum_zsaq.algorithms.smoothing import Link, find_links, smooth
from optimum_zsaq.integrations.data import uncached_batch


LINKS = {
    "llama-tied": {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
        "up_proj": ("down_proj",),
    },
    "opt-tied": {
        "self_attn_layer_norm": ("q_proj", "k_proj", "v_proj"),
        "final_layer_norm": ("fc1",),
        "v_proj": ("out_proj",),
        "fc1": ("fc2",),  # ReLU lets factors pass
    },
    "gpt2-tied": {"ln_1": ("c_attn",), "ln_2": ("c_fc",)},  # GELU does not
    "bert": {"value": ("dense",)},  # what its norms give goes on beside the layers, too
}


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return uncached_batch(model, inputs(model))


def short(link: Link) -> tuple[str, tuple[str, ...]]:
    return link.source.split(".")[-1], tuple(name.split(".")[-1] for name in link.layers)


class OneMoreNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (1.0 + self.weight)


class Block(nn.Module):
    def __init__(self, norm: nn.Module, read_beside: bool = False):
        super().__init__()
        self.norm, self.up, self.down, self.read_beside = norm, nn.Linear(8, 12), nn.Linear(12, 8), read_beside

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.up(y))) + (y if self.read_beside else 0.0)


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, times: int = 1):
        super().__init__()
        self.blocks, self.times = nn.ModuleList(blocks), times

    def forward(self, x):
        for block in self.blocks:
            for _ in range(self.times):
                x = block(x)
        return x


@pytest.mark.parametrize("name", LINKS)
def test_links_of_families(name):
    model = make(name)
    links = find_links(model, batch_of(model))
    assert dict(map(short, links)) == LINKS[name]
    assert len(links) == model.config.num_hidden_layers * len(LINKS[name])


@pytest.mark.parametrize("name", ["llama-tied", "opt-tied", "gpt2-tied", "bert-cls", "t5-tied", "qwen2-untied"])
def test_the_model_computes_what_it_did(name):
    model = make(name)
    batch = batch_of(model)
    links = find_links(model, batch)
    names = [layer for link in links for layer in link.layers]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted, energies = logits(model), input_energies(model, names, [batch])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # trying leaves no trace
    found = smooth(model, links, energies, 0.7)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.allclose(logits(model), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    again = input_energies(model, names, [batch])
    assert all(torch.allclose(found[n], again[n], rtol=1e-3, atol=1e-7) for n in names)


def test_sizes_become_equal_by_the_power():
    """Of a channel of root mean square r there is r ** (1 - power) left, up to a common factor."""
    model = make("llama-tied")
    batch = batch_of(model)
    link = find_links(model, batch)[0]
    energies = input_energies(model, link.layers, [batch])
    before = energies[link.layers[0]].sqrt()
    for power in (0.0, 0.5, 0.5):
        after = smooth(model, [link], energies, power)[link.layers[0]].sqrt()
        ratio = after / before ** (1.0 - power)
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
        energies, before = input_energies(model, link.layers, [batch]), after


def test_a_norm_that_adds_one_to_its_weight():
    net, x = Net(Block(OneMoreNorm(8))).eval(), torch.randn(2, 3, 8)
    assert find_links(net, {"x": x}) == [Link("blocks.0.norm", ("blocks.0.up",), 1.0)]
    wanted = net(x)
    smooth(net, find_links(net, {"x": x}), {"blocks.0.up": torch.rand(8) + 0.1}, 1.0)
    assert torch.allclose(net(x), wanted, atol=1e-5)


def test_what_is_left_alone():
    norm, x = OneMoreNorm(8), {"x": torch.randn(2, 3, 8)}
    assert find_links(Net(Block(norm, read_beside=True)).eval(), x) == []  # the norm's output is read elsewhere
    assert find_links(Net(Block(norm), Block(norm)).eval(), x) == []  # two blocks have one norm
    assert find_links(Net(Block(OneMoreNorm(8)), times=2).eval(), x) == []  # inputs of two kinds


def test_channels_that_carry_nothing_get_no_huge_factor():
    net = Net(Block(OneMoreNorm(8))).eval()
    energies = {"blocks.0.up": torch.tensor([1.0] * 7 + [0.0])}
    weight = net.blocks[0].up.weight.detach().clone()
    smooth(net, [Link("blocks.0.norm", ("blocks.0.up",), 1.0)], energies, 1.0)
    assert (net.blocks[0].up.weight / weight).abs().max() < 100.0


def test_a_link_without_energies_stays_as_it_was():
    net = Net(Block(OneMoreNorm(8))).eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert smooth(net, [Link("blocks.0.norm", ("blocks.0.up",), 1.0)], {}, 1.0) == {}
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
