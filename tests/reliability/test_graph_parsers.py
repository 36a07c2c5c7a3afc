"""The inspection of a graph sees what an engine's parser sees, or refuses the file."""

import random
from pathlib import Path

import onnx
import pytest

from graph_engines import locations_of, opened_by, operators_of
from graph_mutations import model_with_everything, mutations, random_mutation
from gte_deploy.bundle.inspection import OnnxContents, inspect_bytes, with_data_as_inputs
from gte_deploy.bundle.onnx_fields import MESSAGES
from gte_deploy.core.errors import BundleError
from gte_deploy.models import builtin_bundle

# Files that were found by `test_mutated_graphs_in_the_engines`: ONNX Runtime opened each of them, and the inspection
# before 2026-12 either accepted it, or saw other operators or files.
CORPUS = sorted((Path(__file__).with_name("corpus") / "graphs").glob("*.onnx"))


def inspected(data: bytes) -> OnnxContents | None:
    try:
        return inspect_bytes(data, "mutated")
    except BundleError:
        return None


def parsed(data: bytes):
    try:
        return onnx.load_from_string(data)
    except Exception:  # google.protobuf's DecodeError, from whichever of its implementations
        return None


def assert_agrees(data: bytes, name: str) -> None:
    """What the inspection accepts, the `onnx` package reads alike; what onnx writes, the inspection accepts."""
    ours, model = inspected(data), parsed(data)
    if ours is not None:
        assert model is not None, name
        assert ours.operators == operators_of(model), name
        assert ours.external_files == locations_of(model), name
        # As numbers without a sign, as they stand in the file.
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        expected = [(tensor.name, tuple(size % 2**64 for size in tensor.dims)) for tensor in outside]
        assert [(tensor.name, tensor.dims) for tensor in ours.external] == expected, name


def test_the_table_of_fields_is_that_of_onnx():
    """Each message, with the names, numbers, types, oneofs and repetition of its fields."""
    seen = {}

    def describe(message):
        if message.name in seen:
            return
        seen[message.name] = fields = {}
        for field in message.fields:
            inner = field.message_type
            type = inner.name if inner is not None else onnx_type(field)
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
            oneof = f"{field.containing_oneof.name}:" if field.containing_oneof is not None else ""
            fields[field.number] = (field.name, f"{oneof}{'*' * repeated}{type}")
            if inner is not None:
                describe(inner)

    def onnx_type(field):
        kinds = {number: name for name, number in vars(type(field)).items() if name.startswith("TYPE_")}
        name = kinds[field.type].removeprefix("TYPE_").lower()
        return {"enum": "int32", "uint64": "int64"}.get(name, name)  # the same encoding

    describe(onnx.ModelProto.DESCRIPTOR)
    assert seen == MESSAGES


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_refused(path):
    with pytest.raises(BundleError, match="is not an ONNX model"):
        inspect_bytes(path.read_bytes(), path)


def test_the_corpus_is_there():
    assert len(CORPUS) > 60


def test_each_kind_of_encoding_at_each_field(attempts):
    changed = list(mutations(model_with_everything()))
    for name, data in changed:
        assert_agrees(data, name)
    attempts("graphs with one encoding that parsers may read differently: the inspection against onnx", len(changed))


def test_what_onnx_writes_is_accepted():
    """No canonical file is refused for its encoding: the inspection is strict, and not stricter than that."""
    reasons = ("codec can't decode", "external data of", "another file", "are in no file")
    for name, data in mutations(model_with_everything()):
        if (model := parsed(data)) is not None:
            model.DiscardUnknownFields()
            try:
                inspect_bytes(model.SerializeToString(), name)
            except BundleError as error:
                assert any(reason in str(error) for reason in reasons), (name, error)


def test_random_changes(attempts):
    rng = random.Random(0)
    whole = model_with_everything()
    for number in range(3000):
        assert_agrees(random_mutation(whole, rng), f"mutation {number}")
    attempts("graphs with random changes of bytes: the inspection against onnx", 3000)


@pytest.mark.parametrize("name", ["model.onnx", "model_answer.onnx", "model_openvino.onnx"])
def test_the_graphs_of_the_builtin_model(name):
    data = (builtin_bundle() / name).read_bytes()
    assert inspected(data) is not None
    assert_agrees(data, name)


def test_external_data_of_a_real_graph():
    data = (builtin_bundle() / "model.onnx").read_bytes()
    expected = {}
    for tensor in onnx.load_from_string(data).graph.initializer:
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = (entries["location"], int(entries["offset"]), int(entries["length"]))
            expected[tensor.name] = (tensor.data_type, tuple(tensor.dims), *place)
    found = inspect_bytes(data, "model.onnx").external
    assert {t.name: (t.data_type, t.dims, t.location, t.offset, t.length) for t in found} == expected


def test_data_in_other_files_become_inputs_and_nothing_else_changes():
    for data in (model_with_everything(), (builtin_bundle() / "model_openvino.onnx").read_bytes()):
        expected = onnx.load_from_string(data)
        outside = [tensor for tensor in expected.graph.initializer if tensor.external_data]
        inside = [
            onnx.TensorProto.FromString(t.SerializeToString())
            for t in expected.graph.initializer
            if not t.external_data
        ]
        for tensor in outside:
            expected.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        del expected.graph.initializer[:]
        expected.graph.initializer.extend(inside)
        assert outside
        assert onnx.load_from_string(with_data_as_inputs(data, inspect_bytes(data, "a graph").external)) == expected


def external(**changes):
    model = onnx.load_from_string(model_with_everything())
    tensor = model.graph.initializer[0]
    entries = {entry.key: entry.value for entry in tensor.external_data} | changes
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (external(location="*/_ORT_MEM_ADDR_/*", offset="4096"), "in no file"),
        (external(location=""), "not clear"),
        (external(offset="0x10"), "the place"),
        (external(length="-1"), "the place"),
        (external(prepacked_0="x"), "the keys"),
    ],
)
def test_unclear_external_data_are_refused(model, says):
    with pytest.raises(BundleError, match=says):
        inspect_bytes(model.SerializeToString(), "a graph")


def test_external_data_anywhere_else_are_refused():
    model = external()
    constant = next(node for node in model.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(model.graph.initializer[0])
    with pytest.raises(BundleError, match="is no initializer"):
        inspect_bytes(model.SerializeToString(), "a graph")


@pytest.mark.parametrize(
    ("engine", "files", "drawn"),
    [
        ("onnxruntime", 100, 2000),
        ("openvino", 20, 2000),  # it compiles slowly
        pytest.param("onnxruntime", 1500, 40_000, marks=pytest.mark.slow),
        pytest.param("openvino", 300, 40_000, marks=pytest.mark.slow),
    ],
)
def test_mutated_graphs_in_the_engines(engine, files, drawn, tmp_path, attempts):
    """No accepted graph crashes an engine, or has an operator that ONNX Runtime sees and the inspection does not."""
    pytest.importorskip(engine)
    rng = random.Random(1)
    whole = model_with_everything()
    changed = [data for _, data in mutations(whole)]
    changed += [random_mutation(whole, rng) for _ in range(drawn)]
    accepted = {data: contents for data in changed if (contents := inspected(data)) is not None}
    names = {}
    (tmp_path / "weights.bin").write_bytes(bytes(24))
    for number, data in enumerate(rng.sample(sorted(accepted), min(files, len(accepted)))):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        names[path] = accepted[data]
    opened, crashed = 0, []
    for path, seen in opened_by(engine, list(names)):
        crashed += [path] if seen == "crashed" else []
        opened += seen not in (None, "crashed")
        assert seen in (None, "crashed") or seen <= names[path].operators, path
    attempts(f"mutated graphs that the inspection accepts, opened in a process: {engine}", len(names), len(crashed))
    assert crashed == []
    assert opened > len(names) / 15
