"""What crosses the backends: both installed at once, each for its own models, with the same numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest

import dopt_api
from dopt_api.errors import ModelError
from dopt_api.params import read_params
from dopt_api.quantizer.short_sums import overflowing, partners


def test_both_backends_are_listed_without_importing_a_framework():
    code = (
        "import sys, dopt_api\n"
        "assert [(b.name, b.error) for b in dopt_api.backends()] == [('tf', ''), ('torch', '')]\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
        "import dopt.dopt_tf.opt_main, dopt.dopt_torch.opt_main\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def choose_all(path, strategy="Quant_INT8-8"):
    content = json.loads(path.read_text())
    for layer in content["layer_strategy"].values():
        layer["quant_strategy"] = strategy
    path.write_text(json.dumps(content))
    return path


def test_the_same_layer_has_the_same_numbers_in_both(tmp_path):
    import tensorflow as tf
    import torch

    v1 = tf.compat.v1
    numbers = np.random.default_rng(0)
    kernel, bias = numbers.standard_normal((6, 4, 3, 3)).astype("f"), numbers.standard_normal(6).astype("f")
    data = numbers.standard_normal((5, 4, 9, 9)).astype("f")

    conv = torch.nn.Conv2d(4, 6, 3)
    conv.load_state_dict({"weight": torch.from_numpy(kernel), "bias": torch.from_numpy(bias)})
    model = torch.nn.Sequential(conv).eval()
    config = choose_all(dopt_api.generate_config(model, "x:1,4,9,9", tmp_path / "torch.json"))
    quantized = dopt_api.optimize(model, config)
    dopt_api.set_calibrate_state(quantized, True)
    quantized(torch.from_numpy(data))
    dopt_api.set_calibrate_state(quantized, False)
    with torch.no_grad():
        one = quantized(torch.from_numpy(data)).numpy()
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    (tmp_path / "torch").mkdir()
    (first,) = read_params(dopt_api.export(model, config, tmp_path / "quant.pth", tmp_path / "torch").params).layers

    def build():
        x = v1.placeholder(tf.float32, [None, 9, 9, 4], name="x")
        value = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))
        w = v1.get_variable("kernel", value.shape, initializer=v1.constant_initializer(value), use_resource=True)
        b = v1.get_variable("bias", [6], initializer=v1.constant_initializer(bias), use_resource=True)
        return x, tf.nn.bias_add(tf.nn.conv2d(x, w, 1, "VALID"), b, name="y")

    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        config = choose_all(dopt_api.generate_config(sess, None, tmp_path / "tf.json"))
    with tf.Graph().as_default(), v1.Session() as sess:
        x, y = build()
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {x: data.transpose(0, 2, 3, 1)})
        dopt_api.set_calibrate_state(sess, False)
        other = sess.run(y, {x: data.transpose(0, 2, 3, 1)}).transpose(0, 3, 1, 2)
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        (second,) = read_params(dopt_api.export(sess, config, saved, tmp_path, output_names=["y"]).params).layers
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for part in ("input", "weight"):
        assert getattr(first, part).scale == getattr(second, part).scale
        assert getattr(first, part).zero_point == getattr(second, part).zero_point
    assert first.bias.scale == second.bias.scale


def test_the_same_layers_are_the_same_integers_in_onnx(tmp_path):  # noqa: PLR0915  # the same way twice
    """All numbers are such that float sums are exact, so that both backends see the same activations to the bit."""
    import onnx
    import onnxruntime
    import tensorflow as tf
    import torch

    v1 = tf.compat.v1
    numbers = np.random.default_rng(0)
    shapes = {"conv": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "linear": (5, 8)}
    kernels = {name: (numbers.integers(-8, 9, shape) / 8).astype("f") for name, shape in shapes.items()}
    biases = {name: (numbers.integers(-16, 17, shape[0]) / 16).astype("f") for name, shape in shapes.items()}
    data = (numbers.integers(-4, 5, (5, 3, 6, 6)) / 4).astype("f")

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    ).eval()
    for layer, name in zip((model[0], model[2], model[6]), shapes, strict=True):
        layer.load_state_dict({"weight": torch.from_numpy(kernels[name]), "bias": torch.from_numpy(biases[name])})
    config = choose_all(dopt_api.generate_config(model, "x:5,3,6,6", tmp_path / "torch.json"))
    quantized = dopt_api.optimize(model, config)
    dopt_api.set_calibrate_state(quantized, True)
    quantized(torch.from_numpy(data))
    dopt_api.set_calibrate_state(quantized, False)
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    (tmp_path / "torch").mkdir()
    one = dopt_api.export(model, config, tmp_path / "quant.pth", tmp_path / "torch", formats=["onnx_qdq"])

    orders = {"conv": (2, 3, 1, 0), "depthwise": (2, 3, 0, 1), "linear": (1, 0)}

    def build():
        def variable(name, value):
            value = np.ascontiguousarray(value)
            return v1.get_variable(name, value.shape, initializer=v1.constant_initializer(value))

        w, b = (
            {name: variable(f"{name}/{kind}", change(name)) for name in shapes}
            for kind, change in (("kernel", lambda name: kernels[name].transpose(orders[name])), ("bias", biases.get))
        )
        x = v1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        y = tf.nn.relu6(tf.nn.bias_add(tf.nn.conv2d(x, w["conv"], 1, "SAME"), b["conv"]))
        y = tf.nn.depthwise_conv2d(y, w["depthwise"], [1, 1, 1, 1], "VALID", name="depthwise")
        y = tf.reduce_mean(tf.nn.relu(tf.nn.bias_add(y, b["depthwise"])), [1, 2])
        return x, tf.nn.bias_add(tf.matmul(y, w["linear"]), b["linear"], name="y")

    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        config = choose_all(dopt_api.generate_config(sess, None, tmp_path / "tf.json"))
    with tf.Graph().as_default(), v1.Session() as sess:
        x, y = build()
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {x: data.transpose(0, 2, 3, 1)})
        dopt_api.set_calibrate_state(sess, False)
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    (tmp_path / "tf").mkdir()
    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        other = dopt_api.export(sess, config, saved, tmp_path / "tf", output_names=["y"], formats=["onnx_qdq"])

    found = []
    for made in (one, other):
        (file,) = made.others
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
        parts = [part.tensor for layer in read_params(made.params).layers for part in (layer.weight, layer.bias)]
        found.append([stored[f"{name}/dopt/integers"] for name in parts])
    assert [array.shape for array in found[0][::2]] == list(shapes.values())
    assert [array.dtype.name for array in found[0]] == ["int8", "int32"] * 3
    for mine, theirs in zip(*found, strict=True):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    results = [
        onnxruntime.InferenceSession(made.others[0].read_bytes(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for made, feed in ((one, {"x": data}), (other, {"x:0": data.transpose(0, 2, 3, 1)}))
    ]
    np.testing.assert_array_equal(*results)


def test_a_model_of_the_other_framework_is_refused_by_name():
    import torch

    with pytest.raises(ModelError, match="The backend 'tf' does not handle a torch"):
        dopt_api.generate_config(torch.nn.Linear(2, 2), "x:1,2", backend="tf")


@pytest.mark.parametrize(("strategy", "short_sums"), [("Quant_INT8-4", False), ("Quant_INT8-8", True)])
def test_rounding_chooses_the_same_integers_in_both(tmp_path, strategy, short_sums):
    """Rows of a matrix product are all looked at, so that both backends sum the same moments."""
    import tensorflow as tf
    import torch

    from dopt_tf.post_training import post_training as post_training_tf
    from dopt_torch.post_training import post_training as post_training_torch

    v1 = tf.compat.v1
    numbers = np.random.default_rng(0)
    kernels = [(numbers.standard_normal(shape) / 4).astype("f") for shape in ((24, 16), (5, 24))]
    biases = [numbers.standard_normal(size).astype("f") for size in (24, 5)]
    data = [numbers.standard_normal((40, 16)).astype("f") for _ in range(3)]

    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 5)).eval()
    for layer, kernel, bias in zip((model[0], model[2]), kernels, biases, strict=True):
        layer.load_state_dict({"weight": torch.from_numpy(kernel), "bias": torch.from_numpy(bias)})
    config = choose_all(dopt_api.generate_config(model, "x:1,16", tmp_path / "torch.json"), strategy)
    quantized = dopt_api.optimize(model, config)
    one = post_training_torch(
        quantized, [torch.from_numpy(batch) for batch in data], samples=120, short_sums=short_sums
    )
    found = [layer.weight.detach().numpy() for layer in (quantized[0], quantized[2])]
    shifted = [layer.bias.detach().numpy() for layer in (quantized[0], quantized[2])]

    def build():
        x = v1.placeholder(tf.float32, [None, 16], name="x")
        y = x
        for number, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            w, b = (
                v1.get_variable(f"{name}{number}", value.shape, initializer=v1.constant_initializer(value))
                for name, value in (("kernel", np.ascontiguousarray(kernel.T)), ("bias", bias))
            )
            y = tf.nn.bias_add(tf.matmul(y, w, name=f"fc{number}"), b)
            y = tf.nn.relu(y) if number == 0 else y
        return x

    with tf.Graph().as_default(), v1.Session() as sess:
        x = build()
        config = choose_all(dopt_api.generate_config(sess, None, tmp_path / "tf.json"), strategy)
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        other = post_training_tf(sess, [{x: batch} for batch in data], samples=120, short_sums=short_sums)
        values = sess.run({variable.op.name: variable for variable in v1.global_variables()})
    for layer, kernel, weight in zip((quantized[0], quantized[2]), kernels, found, strict=True):
        pairs = partners(1, *kernel.shape, 1, channels_last=True)
        scale = layer.dopt_quantizer.learned_weight_scale(layer.weight).detach().numpy().reshape(-1, 1)
        assert not (short_sums and overflowing(np.rint(weight / scale), pairs).any())
        assert overflowing(np.rint(127 * kernel / np.abs(kernel).max(1, keepdims=True)), pairs).any()
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        assert (first.reason, second.reason) == ("", "")
        assert first.rounded == pytest.approx(second.rounded, rel=0.02)
        close = np.isclose(found[number], values[f"kernel{number}"].T, rtol=1e-4, atol=1e-6)
        assert close.mean() > 0.99  # an input that float sums leave at a tie may round the other way
        assert not np.allclose(found[number], kernels[number], atol=1e-3)
        np.testing.assert_allclose(shifted[number], values[f"bias{number}"], atol=1e-3)


def test_a_recorded_output_has_the_same_numbers_in_both(tmp_path):
    import tensorflow as tf
    import torch

    v1 = tf.compat.v1
    numbers = np.random.default_rng(0)  # whole numbers, so that sums are exact in any order
    kernel, bias = numbers.integers(-4, 5, (6, 4, 3, 3)).astype("f"), numbers.integers(-9, 9, 6).astype("f")
    last, data = numbers.integers(-4, 5, (2, 6, 1, 1)).astype("f"), numbers.integers(-8, 9, (5, 4, 9, 9)).astype("f")

    def recorded(path):
        content = json.loads(choose_all(path).read_text())
        for layer in content["layer_strategy"].values():
            layer |= {"output": True, "range": "mse"}
        path.write_text(json.dumps(content))
        return path

    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 1, bias=False))
    weights = {"0.weight": kernel, "0.bias": bias, "2.weight": last}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    config = recorded(dopt_api.generate_config(model.eval(), "x:1,4,9,9", tmp_path / "torch.json"))
    quantized = dopt_api.optimize(model, config)
    dopt_api.set_calibrate_state(quantized, True)
    quantized(torch.from_numpy(data))
    dopt_api.set_calibrate_state(quantized, False)
    with torch.no_grad():
        one = quantized(torch.from_numpy(data)).numpy()
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    (tmp_path / "torch").mkdir()
    first = read_params(dopt_api.export(model, config, tmp_path / "quant.pth", tmp_path / "torch").params).layers

    def build():
        x, values = v1.placeholder(tf.float32, [None, 9, 9, 4], name="x"), {}
        for name, value in weights.items():
            value = np.ascontiguousarray(value.transpose(2, 3, 1, 0)) if value.ndim > 1 else value  # noqa: PLW2901
            values[name] = v1.get_variable(f"v{name}", initializer=value, use_resource=True)
        y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, values["0.weight"], 1, "VALID"), values["0.bias"]), name="relu")
        return x, tf.identity(tf.nn.conv2d(y, values["2.weight"], 1, "VALID"), name="y")

    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        config = recorded(dopt_api.generate_config(sess, None, tmp_path / "tf.json"))
    with tf.Graph().as_default(), v1.Session() as sess:
        x, y = build()
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {x: data.transpose(0, 2, 3, 1)})
        dopt_api.set_calibrate_state(sess, False)
        other = sess.run(y, {x: data.transpose(0, 2, 3, 1)}).transpose(0, 3, 1, 2)
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    with tf.Graph().as_default(), v1.Session() as sess:
        build()
        second = read_params(dopt_api.export(sess, config, saved, tmp_path, output_names=["y"]).params).layers
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.output.scale, ours.output.zero_point) == (theirs.output.scale, theirs.output.zero_point)
    assert first[0].output.zero_point == (0,)
    assert second[0].output.tensor == "relu:0"
    steps = (one - other) / first[1].output.scale[0]
    assert np.abs(steps).max() < 1.01
    assert np.mean(np.abs(steps) > 0.01) < 0.01
