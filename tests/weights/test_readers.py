"""Malformed weight files: every one gives one WeightsError that names the trouble."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qkd_jax.errors import WeightsError
from qkd_jax.weights.readers import read_npz, read_onnx, read_safetensors

GOLDEN = Path(__file__).parent.parent / "golden"
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def safetensors_bytes(header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_layouts_give_equal_values(tmp_path, save):
    path = tmp_path / "a.npz"
    save(
        path,
        c=VALUES,
        fortran=np.asfortranarray(VALUES),
        big=VALUES.astype(">f4"),
        one=VALUES[0, 0],
    )
    arrays = read_npz(path)
    for name in ("c", "fortran", "big"):
        np.testing.assert_array_equal(arrays[name], VALUES)
    assert arrays["one"].shape == ()


def test_npz_object_array_is_refused_without_unpickling(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, bad=np.array([{"a": 1}], dtype=object))
    with pytest.raises(WeightsError, match="pickle"):
        read_npz(path)


def test_npz_that_claims_more_than_it_stores_takes_no_memory(tmp_path):
    path = tmp_path / "a.npz"
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bomb.npy", member.getvalue() + b"\0" * 16)
    with pytest.raises(WeightsError, match="header claims 4398046511104 bytes, 16 are stored"):
        read_npz(path)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_truncated_files(tmp_path, keep):
    for name, reader in (("vit_augreg.npz", read_npz), ("vit_clip.safetensors", read_safetensors)):
        data = (GOLDEN / name).read_bytes()
        size = int(len(data) * keep) if isinstance(keep, float) else keep
        path = tmp_path / name
        path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match="truncated"):
            reader(path)


def test_flipped_bytes_are_noticed_in_npz(tmp_path):
    data = bytearray((GOLDEN / "vit_augreg.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        read_npz(path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 40) + b"{}",
        safetensors_bytes(b"not json"),
        safetensors_bytes(b"[1, 2]"),
        safetensors_bytes({"a": entry(dtype="F33")}),
        safetensors_bytes({"a": entry(offsets=(0, 20))}),
        safetensors_bytes({"a": entry(offsets=(4, 28))}),
        safetensors_bytes({"a": entry(), "b": entry()}),
        safetensors_bytes({"a": entry()}, b"\0" * 30),
        safetensors_bytes({"a": entry()}, b"\0" * 8),
        b"",
    ],
    ids=["length", "json", "list", "dtype", "size", "hole", "overlap", "tail", "short", "empty"],
)
def test_bad_safetensors_headers(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_safetensors(path)


def test_onnx_kernels_get_their_module_names(tmp_path):
    from onnx import TensorProto, helper, numpy_helper, save

    kernel = np.array([[1, -2, 3], [4, 5, -128]], np.int8)
    scale, zero = np.array([0.5, 0.25, 2.0], np.float32), np.array([0, 1, 0], np.int8)
    constants = {
        "c1": VALUES,
        "w_quantized": kernel,
        "w_scale": scale,
        "w_zero_point": zero,
        "m.bias": VALUES[0],
    }
    nodes = [
        helper.make_node("MatMul", ["x", "c1"], ["y"], name="/a/b.0/fc/MatMul"),
        helper.make_node("MatMul", ["y", "x"], ["z"], name="/a/attention/MatMul"),
        helper.make_node(
            "MatMulInteger",
            ["q", "w_quantized", "qz", "w_zero_point"],
            ["o"],
            name="/p/MatMul_quant",
        ),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
        for n in ("x", "q", "qz", "z", "o")
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        values[:3],
        values[3:],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = tmp_path / "a.onnx"
    save(helper.make_model(graph), path)
    arrays = read_onnx(path)
    assert sorted(arrays) == ["a.b.0.fc.kernel", "m.bias", "p.kernel"]
    np.testing.assert_array_equal(arrays["a.b.0.fc.kernel"], VALUES)
    expected = (kernel.astype(np.float32) - zero) * scale
    np.testing.assert_array_equal(arrays["p.kernel"], expected)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="no tensors"):
        read_onnx(path)
