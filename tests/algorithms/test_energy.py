"""What the channels of layers' inputs carry, against a sum by hand."""

import pytest
import torch
from torch import nn

from optimum_zsaq.algorithms.energy import input_energies


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(input=self.dropout(self.first(x)))


def test_are_mean_squares_over_all_positions_of_all_batches():
    torch.manual_seed(0)
    net, batches = Net().train(), [{"x": torch.randn(2, 5, 6)}, {"x": torch.randn(1, 3, 6)}]
    found = input_energies(net, ["first", "second", "unused"], batches)
    rows = torch.cat([batch["x"].reshape(-1, 6) for batch in batches])
    assert set(found) == {"first", "second"}  # a layer that nothing reaches has none
    assert torch.allclose(found["first"], rows.square().mean(dim=0), rtol=1e-6)
    assert torch.allclose(found["second"], net.first(rows).square().mean(dim=0), rtol=1e-6)  # without dropout


def test_leave_no_hook_behind():
    net = Net()
    input_energies(net, ["first"], [{"x": torch.randn(2, 6)}])
    with pytest.raises(RuntimeError):
        input_energies(net, ["first"], [{"x": torch.randn(2, 7)}])
    assert not net.first._forward_pre_hooks
