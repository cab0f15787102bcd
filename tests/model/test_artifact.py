import hashlib
import io
import json
import random
import threading
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from model.artifact.artifact import parameter_shapes, read_artifact, read_info, write_artifact
from model.artifact.safetensors_io import TensorSpec, read_header, tensor_of, write_safetensors
from model.errors import ModelError
from model.networks.init import initial_kind
from model.networks.parameter_limit import parameter_limit
from model.networks.registry import FAMILIES, build_network
from optim.manifolds import ORTHOGONAL
from tests.model.small_networks import tiny_config, trained_like
from tests.model.verifier import networks


class Folder:
    """Files in memory, opened like those of a store."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.written: list[str] = []

    @contextmanager
    def open(self, name, mode):
        if mode == "rb":
            yield io.BytesIO(self.files[name])
            return
        assert mode == "wb"
        stream = io.BytesIO()
        yield stream
        self.files[name] = stream.getvalue()
        self.written.append(name)


@pytest.fixture
def network():
    return trained_like(tiny_config()).float()


@pytest.fixture
def folder(network):
    folder = Folder()
    write_artifact(
        folder.open,
        network_config=tiny_config(),
        tensors=network.named_parameters(),
        context={"run": "a", "step": 3},
    )
    return folder


def edit(folder, change):
    info = json.loads(folder.files["artifact.json"])
    change(info)
    folder.files["artifact.json"] = json.dumps(info).encode()


def test_round_trip(folder, network, generator):
    assert folder.written == ["weights.safetensors", "artifact.json"]
    artifact = read_artifact(folder.open)
    assert not artifact.network.training
    for (name, p), (other, q) in zip(
        network.named_parameters(), artifact.network.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(p, q)
    x = torch.rand(2, 1, 4, 4, generator=generator)
    assert torch.equal(artifact.network(x), network(x))
    info = artifact.info
    assert info == read_info(folder.open)
    assert info.network == tiny_config()
    assert info.context == {"run": "a", "step": 3}
    assert info.norm == "l2"
    assert info.native_input_shape == info.network_input_shape == (1, 4, 4)
    assert info.weights_bytes == len(folder.files["weights.safetensors"])
    assert info.weights_sha256 == hashlib.sha256(folder.files["weights.safetensors"]).hexdigest()


def test_classes_keep_their_names_which_change_no_function(folder, network):
    classes = tiny_config().num_classes
    names = tuple(f"hot dog {label}" for label in range(classes))
    named = Folder()
    info = write_artifact(
        named.open,
        network_config=tiny_config(),
        tensors=network.named_parameters(),
        context={},
        class_names=names,
    )
    assert read_info(named.open).class_names == names
    assert read_info(named.open).class_name(1) == "hot dog 1"
    assert read_info(folder.open).class_name(1) == "1"
    assert info.digest == read_info(folder.open).digest
    edit(named, lambda info: info["class_names"].pop())
    with pytest.raises(ModelError, match=rf"{classes - 1} class names for {classes} classes"):
        read_info(named.open)
    edit(named, lambda info: info.update(class_names=["x" * 2000] * classes))
    with pytest.raises(ModelError, match=r"a class of .* has a name of 2,000 bytes"):
        read_info(named.open)


def test_residuals_are_measured_in_float64_on_the_stored_values(folder, network):
    info = read_info(folder.open)
    expected = {
        name: ORTHOGONAL.residual(p.detach())
        for name, p in network.named_parameters()
        if initial_kind(p) == "haar"
    }
    assert info.orthogonality_residuals == expected
    assert info.largest_residual == max(expected.values())
    assert 1e-8 < info.largest_residual < 1e-5


def test_weights_are_readable_by_the_stock_library(folder, network):
    stock = safetensors.torch.load(folder.files["weights.safetensors"])
    assert stock.keys() == parameter_shapes(tiny_config()).keys()
    assert all(torch.equal(stock[name], p) for name, p in network.named_parameters())


def test_digest_names_the_function_and_not_its_history(folder, network):
    other = Folder()
    info = write_artifact(
        other.open,
        network_config=tiny_config(),
        tensors=network.double().named_parameters(),
        context={},
    )
    assert info.digest == read_info(folder.open).digest
    assert info.digest != info.weights_sha256


def test_refuses_a_changed_byte_of_the_weights(folder):
    data = bytearray(folder.files["weights.safetensors"])
    data[-5] ^= 1
    folder.files["weights.safetensors"] = bytes(data)
    with pytest.raises(ModelError, match=r"weights\.safetensors has sha256"):
        read_artifact(folder.open)


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_refuses_another_length(folder, extra):
    data = folder.files["weights.safetensors"]
    folder.files["weights.safetensors"] = data + extra if extra else data[:-4]
    with pytest.raises(
        ModelError, match=r"weights\.safetensors has \d+ bytes, artifact\.json says"
    ):
        read_artifact(folder.open)


@pytest.mark.parametrize("field", ["beta", "pool_tau"])
def test_refuses_a_changed_configuration(folder, field):
    edit(folder, lambda info: info["network"].update({field: 0.25}))
    with pytest.raises(ModelError, match="states digest"):
        read_artifact(folder.open)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(schema_version=1), "schema_version=1; this code reads 2"),
        (lambda info: info.update(surprise=1), "surprise"),
        (lambda info: info.pop("norm"), "norm"),
        (lambda info: info["network"].update(width=3), "width=3"),
    ],
)
def test_refuses_a_damaged_description(folder, change, message):
    edit(folder, change)
    with pytest.raises(ModelError, match=message):
        read_artifact(folder.open)


def sealed(folder, **network):
    """Another network in a description whose digest agrees."""
    info = json.loads(folder.files["artifact.json"])
    info["network"].update(network)
    body = {"network": info["network"], "weights_sha256": info["weights_sha256"]}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    info["digest"] = hashlib.sha256(text.encode()).hexdigest()
    folder.files["artifact.json"] = json.dumps(info).encode()


@pytest.mark.parametrize(
    "changes",
    [{"depth": 10**9}, {"width": 2**20}, {"width": 2**40}, {"num_classes": 2**40}],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_is_built_that_the_weights_could_not_fill(folder, changes):
    sealed(folder, **changes)
    with pytest.raises(ModelError, match=r"more than the \d+ values of its weights|can be built"):
        read_info(folder.open)


def test_weights_that_are_stated_and_not_there_fill_nothing(folder):
    sealed(folder, depth=10**9)
    edit(folder, lambda info: info.update(weights_bytes=10**15))
    with pytest.raises(ModelError, match=r"bytes, artifact\.json says 1000000000000000"):
        read_info(folder.open)


def test_a_network_of_another_thread_is_not_counted():
    built = []
    with parameter_limit(0):
        thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        with pytest.raises(ModelError, match="more than the 0 values"):
            torch.nn.Linear(2, 2)
    assert len(built) == 1
    torch.nn.Linear(2, 2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_may_have_as_many_values_as_it_has(kind):
    settings = networks.FAMILIES[kind](random.Random(0))
    config = networks.parsed(kind=kind, num_classes=3, **settings)
    network = build_network(config)
    values = [*network.parameters(), *network.buffers()]
    with parameter_limit(sum(value.numel() for value in values)):
        build_network(config)


def test_refuses_text_that_is_not_json(folder):
    folder.files["artifact.json"] = b"\x80{"
    with pytest.raises(ModelError, match=r"artifact\.json is damaged"):
        read_artifact(folder.open)


def test_refuses_weights_without_a_tensor(folder, network):
    stock = safetensors.torch.load(folder.files["weights.safetensors"])
    del stock["blocks.1.b"]
    folder.files["weights.safetensors"] = safetensors.torch.save(stock)
    size = len(folder.files["weights.safetensors"])
    edit(folder, lambda info: info.update(weights_bytes=size))
    with pytest.raises(ModelError, match=r"1 tensors differ, first blocks\.1\.b: stored None"):
        read_artifact(folder.open)


def test_writing_refuses_missing_and_bad_tensors(network):
    tensors = list(network.named_parameters())

    def write(values):
        folder = Folder()
        try:
            write_artifact(folder.open, network_config=tiny_config(), tensors=values, context={})
        finally:
            assert "artifact.json" not in folder.files

    with pytest.raises(ModelError, match=r"head\.bias is missing"):
        write(tensors[:-1])
    with pytest.raises(ModelError, match=r"head\.bias came after"):
        write([*tensors, tensors[-1]])
    with pytest.raises(ModelError, match=r"stem\.weight .* is due"):
        write(tensors[::-1])
    with pytest.raises(ModelError, match=r"stem\.weight holds values that are not finite"):
        write([("stem.weight", torch.full((16, 16), torch.nan))])


def test_safetensors_of_many_types_and_shapes(generator):
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "step": torch.tensor([3]),
        "strided": torch.randn(4, 3, generator=generator).T,
    }
    stream = io.BytesIO()
    specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    digest = write_safetensors(stream, specs, iter(tensors.items()), {"rank": "0"})
    data = stream.getvalue()
    assert digest.size == len(data)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    stock = safetensors.torch.load(data)
    assert stock.keys() == tensors.keys()
    ranges, metadata = read_header(io.BytesIO(data))
    assert metadata == {"rank": "0"}
    assert set(ranges) == set(tensors)
    for name, expected in tensors.items():
        r = ranges[name]
        assert torch.equal(stock[name], expected)
        assert torch.equal(tensor_of(data[r.start : r.stop], r.dtype, r.shape), expected)
    a = ranges["a"]
    row = data[a.start + 20 : a.start + 40]
    assert torch.equal(tensor_of(row, torch.float32, (5,)), tensors["a"][1])


def test_header_of_the_stock_library_is_read(generator):
    tensors = {"x": torch.randn(2, 3, generator=generator), "y": torch.arange(5)}
    data = safetensors.torch.save(tensors)
    ranges, _ = read_header(io.BytesIO(data))
    for name, r in ranges.items():
        assert torch.equal(tensor_of(data[r.start : r.stop], r.dtype, r.shape), tensors[name])


def with_header(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x00", "ends after 2 of 8 bytes"),
        (b"\xff" * 8, "the limit is"),
        (b"\x02" + b"\x00" * 7 + b"{]", "header is damaged"),
        (with_header([]), "header is damaged"),
        (b"[" * 100_000, "the limit is"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "header is damaged: maximum"),
        (((16 << 20) + 1).to_bytes(8, "little"), "16,777,217 bytes, the limit is"),
        (
            with_header({"x" * 1025: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
            "a name of 1,025 bytes",
        ),
        (with_header({"x": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]}}), "whole num"),
        (with_header({"x": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}), "whole num"),
        (with_header({"x": {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 1]}}), "whole num"),
        (
            with_header({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, float("inf")]}}),
            "whole num",
        ),
        (with_header({"x": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}), "F8"),
        (with_header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "damaged"),
        (with_header({"x": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]}}), "due at"),
    ],
)
def test_header_reader_refuses(data, message):
    with pytest.raises(ModelError, match=message):
        read_header(io.BytesIO(data))


def test_safetensors_writer_refuses_what_it_cannot_write():
    for specs, message in (
        ([TensorSpec("x", (1,), torch.complex64)], "do not hold torch.complex64"),
        ([TensorSpec("x", (1,)), TensorSpec("x", (1,))], "two tensors are named x"),
    ):
        with pytest.raises(ModelError, match=message):
            write_safetensors(io.BytesIO(), specs, [])
    with pytest.raises(ModelError, match="7 bytes for a tensor"):
        tensor_of(b"1234567", torch.float32, (2,))
