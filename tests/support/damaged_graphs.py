"""ONNX files that are damaged in every way that was thought of: seeded, so that a case can be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper

from optin_deploy.network.wire import length_delimited
from support.tiny_graphs import FORMS, value

Damage = Callable[[onnx.ModelProto, Random], None]

OUTSIDE = "outside.bin"
"""A file beside the folder of the model, which nothing may read or change."""
SIZES = (-(2**63), -2, -1, 0, 1, 2, 3, 7, 24, 25, 48, 2**31, 2**40, 2**60, 2**63 - 1)
NAMES = ("", "x", "y", "h", "w", "nowhere", "a\0b", "é" * 3, "n" * 100_000, "../..", "x:0/é")
OPERATORS = ("Relu", "MatMul", "Reshape", "If", "Loop", "Constant", "Gather", "Split", "Add", "Twice", "Nothing", "")
LOCATIONS = (
    "../outside.bin",
    "/etc/passwd",
    "link.bin",
    "folder",
    "none.bin",
    "w.bin",
    "m.onnx",
    "",
    ".",
    "..",
    "a\0b",
    "\0",
)


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """All of them, also of functions and branches."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    found = []
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += [inner for attribute in node.attribute for inner in attribute.g.node]
    return found


def _any_node(model: onnx.ModelProto, random: Random) -> onnx.NodeProto:
    return random.choice(_nodes(model) or [model.graph.node.add()])


def _any_tensor(model: onnx.ModelProto, random: Random) -> TensorProto:
    tensors = [*model.graph.initializer]
    for node in _nodes(model):
        tensors += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        tensors += [tensor for attribute in node.attribute for tensor in attribute.g.initializer]
    return random.choice(tensors or [model.graph.initializer.add()])


def _any_name(model: onnx.ModelProto, random: Random) -> str:
    known = [name for node in _nodes(model) for name in (*node.input, *node.output)]
    return random.choice([*known, *NAMES])


def drop_node(model: onnx.ModelProto, random: Random) -> None:
    if model.graph.node:
        del model.graph.node[random.randrange(len(model.graph.node))]


def repeat_node(model: onnx.ModelProto, random: Random) -> None:
    copied = model.graph.node.add()
    copied.CopyFrom(_any_node(model, random))
    if random.random() < 0.5:
        for i, name in enumerate(copied.output):
            copied.output[i] = f"{name}_again"


def shuffle_nodes(model: onnx.ModelProto, random: Random) -> None:
    nodes = list(model.graph.node)
    random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def shuffle_inputs(model: onnx.ModelProto, random: Random) -> None:
    node = _any_node(model, random)
    names = list(node.input)
    random.shuffle(names)
    node.input[:] = names


def rewire(model: onnx.ModelProto, random: Random) -> None:
    node = _any_node(model, random)
    names = random.choice([node.input, node.output])
    if names and random.random() < 0.8:
        names[random.randrange(len(names))] = _any_name(model, random)
    elif names and random.random() < 0.5:
        names.pop()
    else:
        names.append(_any_name(model, random))


def cycle(model: onnx.ModelProto, random: Random) -> None:
    node = _any_node(model, random)
    later = _any_node(model, random)
    if node.input and later.output:
        node.input[random.randrange(len(node.input))] = random.choice(later.output)


def other_operator(model: onnx.ModelProto, random: Random) -> None:
    node = _any_node(model, random)
    node.op_type = random.choice(OPERATORS)
    if random.random() < 0.3:
        node.domain = random.choice(("", "ai.onnx", "own", "com.microsoft", "é"))


def other_attribute(model: onnx.ModelProto, random: Random) -> None:
    node = _any_node(model, random)
    if node.attribute and random.random() < 0.5:
        attribute = random.choice(node.attribute)
        attribute.type = random.choice(list(AttributeProto.AttributeType.values()))
        return
    attribute = node.attribute.add()
    attribute.name = random.choice(
        ("axis", "axes", "to", "perm", "value", "value_ints", "then_branch", "body", "", "é")
    )
    attribute.type = random.choice(list(AttributeProto.AttributeType.values()))
    attribute.i, attribute.s = random.choice(SIZES), b"\xff\xfe"
    attribute.ints.extend(random.choices(SIZES, k=random.randrange(4)))
    attribute.strings.append(b"\xff")
    if random.random() < 0.2:
        attribute.ref_attr_name = "nothing"


def other_sizes(model: onnx.ModelProto, random: Random) -> None:
    tensor = _any_tensor(model, random)
    sizes = list(tensor.dims)
    random.shuffle(sizes)
    sizes = random.choice([sizes, sizes[:-1], [*sizes, random.choice(SIZES)], random.choices(SIZES, k=len(sizes))])
    tensor.dims[:] = sizes


def other_type(model: onnx.ModelProto, random: Random) -> None:
    _any_tensor(model, random).data_type = random.choice([*range(30), -1, 99, 2**31 - 1])


def other_values(model: onnx.ModelProto, random: Random) -> None:
    tensor = _any_tensor(model, random)
    if random.random() < 0.5:
        tensor.raw_data = random.choice(
            [b"", tensor.raw_data[:-1], tensor.raw_data * 2, b"\xff" * len(tensor.raw_data)]
        )
    else:
        tensor.ClearField("raw_data")
        field = random.choice(("float_data", "int32_data", "int64_data", "double_data", "uint64_data"))
        getattr(tensor, field).extend([1] * random.choice((0, 1, 24, 576)))
    if random.random() < 0.2:
        tensor.segment.begin = 5


def other_numbers(model: onnx.ModelProto, random: Random) -> None:
    """Numbers that say how large values are."""
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    for tensor in random.choices(stored, k=random.choice((1, 2))) if stored else ():
        count = len(tensor.raw_data) // 8
        numbers = random.choices((*SIZES, 2**16, 2**28, 2**34), k=count)
        tensor.raw_data = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


def other_port(model: onnx.ModelProto, random: Random) -> None:
    port = random.choice([*model.graph.input, *model.graph.output])
    kind = port.type.tensor_type
    match random.randrange(7):
        case 0:
            kind.elem_type = random.choice([*range(25), -1, 99])
        case 1 if kind.shape.dim:
            random.choice(kind.shape.dim).dim_value = random.choice(SIZES)
        case 2 if kind.shape.dim:
            random.choice(kind.shape.dim).dim_param = random.choice(NAMES)
        case 3:
            kind.ClearField("shape")
        case 4:
            port.ClearField("type")
        case 5:
            port.name = random.choice(NAMES)
        case _:
            kind.shape.dim.add().dim_value = random.choice(SIZES)


def other_ports(model: onnx.ModelProto, random: Random) -> None:
    ports = random.choice([model.graph.input, model.graph.output])
    if random.random() < 0.5 and ports:
        ports.pop()
    else:
        ports.append(value(random.choice(NAMES), *random.choices([size for size in SIZES if size > -2], k=2)))


def rename_weight(model: onnx.ModelProto, random: Random) -> None:
    _any_tensor(model, random).name = random.choice(NAMES)


def stale_shapes(model: onnx.ModelProto, random: Random) -> None:
    for _ in range(3):
        info = model.graph.value_info.add()
        info.name = _any_name(model, random)
        info.type.tensor_type.elem_type = random.randrange(25)
        info.type.tensor_type.shape.dim.add().dim_value = random.choice(SIZES)


def versions(model: onnx.ModelProto, random: Random) -> None:
    match random.randrange(4):
        case 0:
            del model.opset_import[:]
        case 1 if model.opset_import:
            model.opset_import[0].version = random.choice(SIZES)
        case 2:
            model.ir_version = random.choice(SIZES)
        case _:
            model.opset_import.add(domain=random.choice(NAMES), version=random.choice(SIZES))


def elsewhere(model: onnx.ModelProto, random: Random) -> None:
    tensor = _any_tensor(model, random)
    size = len(tensor.raw_data)
    if random.random() < 0.9:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": random.choice(LOCATIONS)}
    if random.random() < 0.5:
        entries["offset"] = random.choice(("0", "1", "64", "-1", "x", str(2**63), "9" * 400))
    if random.random() < 0.5:
        entries["length"] = random.choice((str(size), "0", "-1", "1e3", str(2**63)))
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)


def nest(model: onnx.ModelProto, random: Random) -> None:
    """Put a node into branches of branches."""
    graph = helper.make_graph([_any_node(model, random)], random.choice(NAMES), [], [value("z", 1)])
    for _ in range(random.choice((1, 3, 10, 25))):
        node = onnx.NodeProto(op_type="If", input=[_any_name(model, random)], output=["z"])
        node.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g.CopyFrom(graph)
        graph = onnx.GraphProto(node=[node], output=[value("z", 1)])
    model.graph.node.add(op_type="If", input=["x"], output=["q"]).attribute.add(
        name="then_branch", type=AttributeProto.GRAPH
    ).g.CopyFrom(graph)


def call(model: onnx.ModelProto, random: Random) -> None:
    """Functions that call themselves or others, with other numbers of inputs and outputs."""
    names = ("Twice", "Scale", "Relu")
    function = model.functions.add(domain=random.choice(("own", "", "ai.onnx")), name=random.choice(names))
    function.input.extend(["a"] * random.randrange(3))
    function.output.extend(random.choices(("a", "b", "c"), k=random.randrange(3)))
    for _ in range(random.randrange(4)):
        function.node.add(op_type=random.choice(names), domain="own", input=["a"], output=[random.choice(("b", "c"))])
    model.graph.node.add(op_type=function.name, domain=function.domain, input=["x", "x"], output=["f0", "f1"])


def many(model: onnx.ModelProto, random: Random) -> None:
    for _ in range(5000):
        model.graph.node.add(op_type="Relu", input=["x"])


def odd_parts(model: onnx.ModelProto, random: Random) -> None:
    match random.randrange(5):
        case 0:
            model.graph.sparse_initializer.add().values.name = "s"
        case 1:
            model.training_info.add().initialization.node.add(op_type="Relu")
        case 2:
            model.metadata_props.add(key="", value="é")
        case 3:
            model.graph.quantization_annotation.add(tensor_name=_any_name(model, random))
        case _:
            model.graph.ClearField("name")


DAMAGES: tuple[Damage, ...] = (
    *(drop_node, repeat_node, shuffle_nodes, shuffle_inputs, rewire, cycle, other_operator, other_attribute),
    *(
        other_sizes,
        other_type,
        other_values,
        other_numbers,
        other_port,
        other_ports,
        rename_weight,
        stale_shapes,
        versions,
    ),
    *(elsewhere, nest, call, many, odd_parts),
)


def _flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 20))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def _cut_out(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + content[start + random.randrange(1, 200) :]


def _repeat(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    end = start + random.randrange(1, 200)
    return content[:end] + content[start:end] + content[end:]


def _number(content: bytes, random: Random) -> bytes:
    """A number that protobuf writes in ten bytes, anywhere."""
    start = random.randrange(len(content))
    return content[:start] + b"\xff" * 9 + b"\x01" + content[start + random.randrange(10) :]


def _deep(content: bytes, random: Random) -> bytes:
    """Graphs in nodes in graphs, deeper than protobuf reads."""
    inside = b""
    for _ in range(random.choice((30, 50, 400))):
        for field in (AttributeProto.G_FIELD_NUMBER, onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER, 1):
            inside = length_delimited(field, len(inside)) + inside
    return content + length_delimited(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(inside)) + inside


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _flip, _truncate, _cut_out, _repeat, _number, _deep)


@dataclass(frozen=True)
class Case:
    """A damaged file."""

    path: Path
    words: str
    """How to make it again."""


def damaged(folder: Path, seeds: range) -> Iterator[Case]:
    """Write one damaged model after the other, with a folder of files to point at."""
    (folder / OUTSIDE).write_bytes(bytes(5000))
    inside = folder / "inside"
    (inside / "folder").mkdir(parents=True)
    (inside / "link.bin").symlink_to(folder / OUTSIDE)
    (inside / "w.bin").write_bytes(bytes(5000))
    path = inside / "m.onnx"
    for seed in seeds:
        random = Random(seed)
        form = random.choice(list(FORMS))
        model = FORMS[form]()
        damages = random.choices(DAMAGES, k=random.choice((0, 1, 1, 2, 4)))
        for damage in damages:
            with suppress(DecodeError):  # nested deeper than protobuf itself copies
                damage(model, random)
        content = model.SerializeToString()
        changed = random.choice(BYTES) if not damages or random.random() < 0.2 else None
        path.write_bytes(changed(content, random) if changed else content)
        words = [form, *(damage.__name__ for damage in damages), *([changed.__name__] if changed else [])]
        yield Case(path, f"seed {seed}: {', '.join(words)}")
