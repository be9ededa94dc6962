"""Exported graphs for tests of formats: the way to one, recorded outputs, and a simulation of the two files."""

import json
from dataclasses import replace
from pathlib import Path

import tensorflow as tf
from graphs import randomize, run_pb, session

import dopt_api
from dopt_api.params import QuantParams, TensorParams, read_params, render_params
from dopt_api.quantizer import Grid, scale_zero_point
from dopt_tf.checkpoint import restore_float_checkpoint
from dopt_tf.inference_graph import split
from dopt_tf.litert.frozen_graph import FrozenGraph

v1 = tf.compat.v1


def export(build, folder, feeds, outputs=("logits",), strategies=None):
    """Calibrate a graph and export it; return what the quantized session computes.

    The ``strategies`` are by layer; the others have 8 bits.
    """
    names = [f"{name}:0" for name in outputs]
    with session(build) as (sess, _):
        config = dopt_api.generate_config(sess, None, folder / "config.json")
        content = json.loads(config.read_text(encoding="utf-8"))
        for name, layer in content["layer_strategy"].items():
            layer["quant_strategy"] = (strategies or {}).get(name, "Quant_INT8-8")
        config.write_text(json.dumps(content), encoding="utf-8")
        randomize(sess)
        path = v1.train.Saver().save(sess, str(folder / "float"))
    with session(build) as (sess, _):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        restore_float_checkpoint(sess, path)
        dopt_api.set_calibrate_state(sess, True)
        sess.run(names, feeds)
        dopt_api.set_calibrate_state(sess, False)
        simulated = sess.run(names, feeds)
        saved = v1.train.Saver().save(sess, str(folder / "quant"))
    with session(build) as (sess, _):
        dopt_api.export(sess, config, saved, folder, output_names=list(outputs))
    return simulated


def record_outputs(folder, feeds, of=None):
    """Put the range of each layer's output, or of those that ``of`` names, into the parameter file."""
    params, graph = read_params(folder / "quant_params.json"), FrozenGraph(folder / "model.pb")
    edges = [graph.path_of(layer, layer.node, layer.input.tensor)[-1] for layer in params.layers]
    values = run_pb(folder, [split(edge)[0] for edge in edges], feeds)
    inputs = {layer.input.tensor: layer.input for layer in params.layers}
    layers = []
    for layer, edge, value in zip(params.layers, edges, values, strict=True):
        scale, zero_point = scale_zero_point(value.min(), value.max(), Grid(8))
        output = inputs.get(edge, TensorParams(edge, "uint8", 8, (float(scale),), (int(zero_point),), None))
        layers.append(replace(layer, output=output if of is None or layer.name in of else None))
    return rewrite(folder, QuantParams(params.model, tuple(layers)))


def rewrite(folder, params):
    """Write other parameters in place of a folder's; return them as they are read."""
    (folder / "quant_params.json").write_text(render_params(params), encoding="utf-8")
    return read_params(folder / "quant_params.json")


def simulate(folder, outputs, feeds):
    """Run ``model.pb`` with the inputs and the recorded outputs of its layers on their grids."""
    graph_def = v1.GraphDef.FromString((Path(folder) / "model.pb").read_bytes())
    nodes = {node.name: node for node in graph_def.node}
    layers = read_params(folder / "quant_params.json").layers
    places = [list(map(split, nodes[layer.node].input)).index(split(layer.input.tensor)) for layer in layers]
    for layer, reading in zip(layers, places, strict=True):
        if layer.output is not None:
            edge = split(layer.output.tensor)[0]
            readers = [(node, place) for node in nodes.values() for place in range(len(node.input))]
            readers = [(node, place) for node, place in readers if split(node.input[place])[0] == edge]
            rounded = _rounded(graph_def, edge, layer.output, f"{layer.name}/output")
            for node, place in readers:
                node.input[place] = rounded
            outputs = [rounded if name == edge else name for name in outputs]
        if layer.input.quantized:
            node = nodes[layer.node]
            node.input[reading] = _rounded(graph_def, node.input[reading], layer.input, f"{layer.name}/input")
    with session() as (sess, _):
        tf.import_graph_def(graph_def, name="")
        return sess.run([f"{name}:0" for name in outputs], feeds)


def _rounded(graph_def, edge, part, name):
    """Add nodes that round an edge to a grid; return the last one's name."""

    def add(op, *inputs, **values):
        node = graph_def.node.add(name=f"simulated/{name}/{len(graph_def.node)}", op=op)
        node.input.extend(inputs)
        node.attr["dtype" if op == "Const" else "T"].type = tf.float32.as_datatype_enum
        for key, value in values.items():
            node.attr[key].tensor.CopyFrom(tf.make_tensor_proto(value, tf.float32))
        return node.name

    scale, zero_point = add("Const", value=part.scale[0]), add("Const", value=part.zero_point[0])
    low, high = add("Const", value=0), add("Const", value=2**part.bits - 1)
    shifted = add("AddV2", add("Round", add("RealDiv", edge, scale)), zero_point)
    clipped = add("Minimum", add("Maximum", shifted, low), high)
    return add("Mul", add("Sub", clipped, zero_point), scale)
