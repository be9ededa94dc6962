"""Running models of LiteRT, and what their layers should compute."""

import warnings

import numpy as np
import tensorflow as tf

from dopt_api.integer_sums import convolution_sums
from dopt_tf.litert.flatbuffer import FlatModel, schema

PLAIN = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
FASTEST = tf.lite.experimental.OpResolverType.AUTO


class Run:
    """A run of a model: its tensors by name."""

    def __init__(self, content, feeds, kernels=PLAIN):
        self.model = FlatModel(content)
        self.kinds = [self.model.name_of(operator) for operator in self.model.operators]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
            self._interpreter = tf.lite.Interpreter(
                model_content=content,
                experimental_op_resolver_type=kernels,
                experimental_preserve_all_tensors=kernels == PLAIN,
            )
        inputs = {detail["name"]: detail["index"] for detail in self._interpreter.get_input_details()}
        for name, values in feeds.items():
            self._interpreter.resize_tensor_input(inputs[name], values.shape)
        self._interpreter.allocate_tensors()
        for name, values in feeds.items():
            self._interpreter.set_tensor(inputs[name], values)
        self._interpreter.invoke()
        self.outputs = [self[detail["index"]] for detail in self._interpreter.get_output_details()]

    def __getitem__(self, number):
        return self._interpreter.get_tensor(number)

    def grid(self, number):
        """Return the scales and zero points of a tensor, as the interpreter has them."""
        (detail,) = [one for one in self._interpreter.get_tensor_details() if one["index"] == number]
        found = detail["quantization_parameters"]
        return found["scales"], found["zero_points"]

    def integer_layers(self):
        """Return the convolutions that run in integers."""
        return [
            operator
            for operator, kind in zip(self.model.operators, self.kinds, strict=True)
            if kind in ("CONV_2D", "DEPTHWISE_CONV_2D")
            and self.model.tensor(operator.outputs[0]).type == schema.TensorType.INT8
        ]

    def steps_off(self, operator):
        """Return how far each number of a convolution's output is from what exact sums of its input give, in steps."""
        source, weight, bias = operator.inputs
        (scale, zero_point), (in_scale, in_zero_point) = self.grid(operator.outputs[0]), self.grid(source)
        depthwise = self.model.name_of(operator) == "DEPTHWISE_CONV_2D"
        kernel = self[weight].transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        options = operator.builtinOptions
        strides = [options.strideH, options.strideW]
        x = self[source].astype(np.int64).transpose(0, 3, 1, 2) - in_zero_point[0]
        same = options.padding == schema.Padding.SAME
        pads = [
            _around(*given) if same else (0, 0) for given in zip(x.shape[2:], kernel.shape[2:], strides, strict=True)
        ]
        sums = convolution_sums(
            x,
            kernel,
            pads=[before for before, _ in pads] + [after for _, after in pads],
            strides=strides,
            dilations=[1, 1],
            groups=x.shape[1] if depthwise else 1,
        ).transpose(0, 2, 3, 1)
        unit = in_scale.astype(np.float64) * self.grid(weight)[0] / scale[0]
        wanted = np.rint((sums + self[bias]) * unit) + zero_point[0]
        low, high = {
            schema.ActivationFunctionType.NONE: (-128, 127),
            schema.ActivationFunctionType.RELU: (zero_point[0], 127),
            schema.ActivationFunctionType.RELU6: (zero_point[0], zero_point[0] + np.rint(6 / scale[0])),
        }[options.fusedActivationFunction]
        return np.abs(np.clip(wanted, max(low, -128), min(high, 127)) - self[operator.outputs[0]])


def _around(size, kernel, stride):
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
