"""The format ``amct_record``, read back by protobuf with AMCT's schema."""

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from quantized_chain import edit, network

try:
    from google.protobuf.message_factory import GetMessageClass
except ImportError:  # before protobuf 4.22
    from google.protobuf.message_factory import MessageFactory

    def GetMessageClass(descriptor):  # noqa: N802  # its name in protobuf
        return MessageFactory().GetPrototype(descriptor)


from dopt_api.errors import FormatError
from dopt_api.formats import convert
from dopt_api.params import read_params


@pytest.fixture(scope="module")
def records():
    """The message class of a record file, from the part of the published schema that quantization uses."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", syntax="proto2")
    layer = file.message_type.add(name="SingleLayerRecord")
    for number, label, of, name in (
        (1, kind.LABEL_OPTIONAL, kind.TYPE_FLOAT, "scale_d"),
        (2, kind.LABEL_OPTIONAL, kind.TYPE_INT32, "offset_d"),
        (3, kind.LABEL_REPEATED, kind.TYPE_FLOAT, "scale_w"),
        (4, kind.LABEL_REPEATED, kind.TYPE_INT32, "offset_w"),
        (9, kind.LABEL_OPTIONAL, kind.TYPE_BOOL, "skip_fusion"),
        (10, kind.LABEL_OPTIONAL, kind.TYPE_STRING, "dst_type"),
    ):
        layer.field.add(name=name, number=number, label=label, type=of)
    entry = file.message_type.add(name="MapFiledEntry")
    entry.field.add(name="key", number=1, label=kind.LABEL_OPTIONAL, type=kind.TYPE_STRING)
    inner = {"label": kind.LABEL_OPTIONAL, "type": kind.TYPE_MESSAGE, "type_name": ".SingleLayerRecord"}
    entry.field.add(name="value", number=2, **inner)
    whole = file.message_type.add(name="ScaleOffsetRecord")
    inner = {"label": kind.LABEL_REPEATED, "type": kind.TYPE_MESSAGE, "type_name": ".MapFiledEntry"}
    whole.field.add(name="record", number=1, **inner)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("ScaleOffsetRecord"))


def test_the_record_is_read_back_with_the_same_numbers(tmp_path, records):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4"])
    edit(tmp_path, lambda layer: layer.update(node='a "quoted" näme', other_calls=[["conv9", "x0"]]))
    (file,) = convert(tmp_path / "quant_params.json", "amct_record", tmp_path)
    assert file.name == "record.txt"
    found = text_format.Parse(file.read_text(encoding="utf-8"), records()).record
    assert [record.key for record in found] == ['a "quoted" näme', "conv9", "conv1", "conv2"]
    assert [record.value.dst_type for record in found] == ["INT8", "INT8", "INT8", "INT4"]
    layers = read_params(tmp_path / "quant_params.json").layers
    for record, layer in zip(found, (layers[0], *layers), strict=True):
        assert np.float32(record.value.scale_d) == np.float32(layer.input.scale[0])
        assert record.value.offset_d == layer.input.zero_point[0] - 128
        np.testing.assert_array_equal(np.float32(record.value.scale_w), np.float32(layer.weight.scale))
        assert list(record.value.offset_w) == [0] * 4
        assert record.value.skip_fusion


@pytest.mark.parametrize("strategy", ["Quant_INT16-8", "Quant_INT4-4"])
def test_activations_of_other_widths_are_refused(tmp_path, strategy):
    network(tmp_path, [strategy])
    with pytest.raises(FormatError, match="cannot express the strategy") as caught:
        convert(tmp_path / "quant_params.json", "amct_record", tmp_path)
    assert caught.value.where == "layer 'layer0'"
    assert not (tmp_path / "record.txt").exists()
