"""A small network with a layer of each kind that is rounded, pictures for it, and how near to float it is."""

import math

import torch
from torch import nn
from torch.nn import functional


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as exported networks have it."""

    def forward(self, x):
        return functional.conv2d(
            functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = Padded(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU6(inplace=True)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 24, (3, 1), padding=(1, 0), dilation=1)
        self.head = nn.Linear(24, 6)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.3, 2)
            self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x):
        x = self.deep(self.act(self.norm(self.stem(x))))
        return self.head(torch.relu_(self.wide(x)).mean((2, 3)))


def batches(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.randn(size, 3, 5, 5, generator=generator) for _ in range(count)]
    return [functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False) for x in coarse]


def sqnr(model, exact, data):
    with torch.no_grad():
        wanted, found = (torch.cat([one(x) for x in data]) for one in (exact, model))
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))
