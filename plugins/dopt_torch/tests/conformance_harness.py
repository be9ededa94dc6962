"""The PyTorch backend as the conformance suite sees it: small networks, and the backend's kernels."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import distributed, multiprocessing, nn

import dopt_api
from dopt_api.params import FloatLayer
from dopt_api.quantizer import BatchNorm
from dopt_conformance import Harness, WrittenGraph
from dopt_torch.fake_quantize import (
    LearnedScale,
    LearnedWeightScale,
    fake_quantize,
    fake_quantize_weight,
    learned_scale,
    weight_scale,
)
from dopt_torch.statistics import DeviceStatistics

F32 = np.float32


class Convolutions(nn.Module):
    """Convolutions with batch normalization, a depthwise one, a residual sum, and a linear layer."""

    shape = (3, 12, 12)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = y + torch.relu(self.bn2(self.conv2(y)))
        return self.fc(y.mean((2, 3)))


class Linear(nn.Module):
    """Linear layers alone, the last without a bias."""

    shape = (10,)

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 16)
        self.b = nn.Linear(16, 12)
        self.c = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


class Transposed(nn.Module):
    """A strided convolution in one dimension, and a transposed one."""

    shape = (4, 16)

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.up = nn.ConvTranspose1d(6, 3, 2, stride=2)

    def forward(self, x):
        return torch.relu(self.up(torch.relu(self.norm(self.down(x)))))


NETWORKS = {"convolutions": Convolutions, "linear": Linear, "transposed": Transposed}

# layer: (module, axis of the channels of its weight, its batch normalization)
LAYERS = {
    "convolutions": {
        "conv1/Conv2D": ("conv1", 0, "bn1"),
        "conv2/Conv2D": ("conv2", 0, "bn2"),
        "fc/Linear": ("fc", 0, None),
    },
    "linear": {f"{name}/Linear": (name, 0, None) for name in "abc"},
    "transposed": {"down/Conv1D": ("down", 0, "norm"), "up/ConvTranspose1D": ("up", 1, None)},
}


class TorchHarness(Harness):
    """Modules in evaluation mode, on two threads."""

    backend = "torch"

    def __init__(self):
        torch.set_num_threads(2)

    # ---- models

    def models(self):
        return tuple(NETWORKS)

    def build(self, name):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = NETWORKS[name]()
            for module in net.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
                    nn.init.uniform_(module.running_mean, -0.5, 0.5)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return net.eval()

    def input_shape(self, name):
        return f"x:{','.join(map(str, (4, *NETWORKS[name].shape)))}"

    def batch(self, name, size, seed):
        return {"x": np.random.default_rng(seed).standard_normal((size, *NETWORKS[name].shape)).astype(F32)}

    def float_layers(self, name):
        net = self.build(name)
        result = {}
        for layer, (path, axis, norm) in LAYERS[name].items():
            module = getattr(net, path)
            folded = None
            if norm is not None:
                parts = getattr(net, norm)
                tensors = (parts.weight, parts.bias, parts.running_mean, parts.running_var)
                folded = BatchNorm(*map(array_of, tensors), parts.eps)
            bias = None if module.bias is None else array_of(module.bias)
            result[layer] = FloatLayer(array_of(module.weight), bias, folded, axis)
        return result

    def activations(self, name, batch):
        net, found = self.build(name), {}

        def keep(layer):
            return lambda _, given: found.update({layer: array_of(given[0])})

        for layer, (path, _, _) in LAYERS[name].items():
            getattr(net, path).register_forward_pre_hook(keep(layer))
        self.run(net, batch)
        return found

    def channel_axis(self, name, layer):
        return -1 if layer.endswith("Linear") else 1

    # ---- going the way

    def run(self, model, batch, *, quantized=True, training=False):
        model.train(training)
        try:
            with torch.set_grad_enabled(training):
                return [array_of(model(torch.from_numpy(batch["x"])))]
        finally:
            model.eval()

    def weights(self, model):
        keys = set().union(*(NETWORKS[name]().state_dict() for name in NETWORKS))
        return {key: array_of(value) for key, value in model.state_dict().items() if key in keys}

    def save(self, model, folder):
        torch.save(model.state_dict(), folder / "model.pth")
        return folder / "model.pth"

    def load(self, model, checkpoint):
        model.load_state_dict(torch.load(checkpoint))

    # ---- what was exported

    def run_file(self, file, batch, output_names):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return session.run(list(output_names) if output_names else None, dict(batch))

    def read_file(self, file):
        graph = onnx.load(str(file)).graph
        edges = {edge for node in graph.node for edge in (*node.input, *node.output)} | {x.name for x in graph.input}
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return WrittenGraph(frozenset(node.name for node in graph.node), frozenset(edges), constants)

    # ---- kernels

    def fake_quantize(self, x, scale, zero_point, grid, axis):
        data, scales = torch.from_numpy(as_weight(x, axis)), torch.from_numpy(np.array(scale))
        if axis is not None:
            return back(fake_quantize_weight(data, scales, None, grid, min(axis, 1)), axis)
        return array_of(fake_quantize(data, scales, grid.qmin - int(zero_point), grid.qmax - int(zero_point)))

    def fake_quantize_gradients(self, upstream, x, scale, zero_point, grid, axis):
        data = torch.tensor(as_weight(x, axis), requires_grad=True)
        scales = torch.tensor(scale, requires_grad=True)
        if axis is not None:
            y = LearnedWeightScale.apply(data, scales, None, grid, min(axis, 1))
        else:
            ends = grid.qmin - int(zero_point), grid.qmax - int(zero_point)
            y, _ = LearnedScale.apply(data, scales, *ends, (slice(0, 0),))
        y.backward(torch.from_numpy(as_weight(upstream, axis)))
        return back(data.grad, axis), array_of(scales.grad)

    def weight_scale(self, weight, grid, axis):
        return array_of(weight_scale(torch.from_numpy(as_weight(weight, axis)), grid, min(axis, 1)))

    def collect(self, batches, channel_axis):
        statistics = DeviceStatistics.empty()
        for batch in batches:
            statistics.update(torch.from_numpy(batch), channel_axis)
        return statistics.to_core()

    def learned_scale(self, scale, gain):
        return array_of(learned_scale(torch.from_numpy(scale), torch.from_numpy(gain)))

    def gain_gradient(self, upstream, scale, gain):
        leaf = torch.tensor(gain, requires_grad=True)
        learned_scale(torch.from_numpy(scale), leaf).backward(torch.from_numpy(upstream))
        return array_of(leaf.grad)

    # ---- capabilities

    def train_step(self, model, batch, *, quant_loss=False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()
        y = model(torch.from_numpy(batch["x"]))
        loss = dopt_api.get_quant_loss(model) if quant_loss else (y - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        return loss.item()

    def quant_loss(self, model, batch):
        self.run(model, batch)
        with torch.no_grad():
            return float(dopt_api.get_quant_loss(model))

    def calibrate_in_processes(self, name, config_file, shards, folder):
        arguments = (name, config_file, shards, folder)
        multiprocessing.spawn(calibrate_one, args=(len(shards), *arguments), nprocs=len(shards))
        return folder / "model.pth"


def array_of(tensor):
    """Return a copy of a tensor as an array."""
    return np.array(tensor.detach().numpy())


def as_weight(x, axis):
    """Return data with the channels on an axis where weights of torch have them: the first or the second."""
    return np.array(x) if axis is None else np.ascontiguousarray(np.moveaxis(x, axis, min(axis, 1)))


def back(tensor, axis):
    """Undo :func:`as_weight`."""
    return array_of(tensor) if axis is None else np.moveaxis(array_of(tensor), min(axis, 1), axis)


def calibrate_one(rank: int, ranks: int, name: str, config_file: Path, shards, folder: Path):
    """Calibrate in one of several processes; the first saves."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    harness = TorchHarness()
    model = harness.optimize(harness.build(name), config_file)
    dopt_api.set_calibrate_state(model, True)
    for batch in shards[rank]:
        harness.run(model, batch)
    dopt_api.set_calibrate_state(model, False)
    if rank == 0:
        harness.save(model, folder)
    distributed.destroy_process_group()
