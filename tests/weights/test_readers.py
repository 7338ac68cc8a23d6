"""Malformed weight files: every one gives one WeightsError that names the trouble."""

import contextlib
import io
import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

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
    with pytest.raises(
        WeightsError, match="expected the 4398046511104 bytes of its header, found 16"
    ):
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


INT8 = {
    "w_quantized": np.ones((2, 3), np.int8),
    "w_scale": np.ones(3, np.float32),
    "w_zero_point": np.zeros(3, np.int8),
}


def write_onnx(path, constants, node="MatMulInteger", change=lambda model: None):
    """A graph of one node and its constants, and what `change` does to it."""
    from onnx import helper, numpy_helper, save

    kernel = next(iter(constants), "w")
    nodes = [helper.make_node(node, ["x", kernel, "xz", "w_zero_point"], ["y"], name="/m/MatMul")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    change(model)
    save(model, path)


@pytest.mark.parametrize(
    "change",
    [
        {"w_scale": None},
        {"w_zero_point": None},
        {"w_scale": np.ones(2, np.float32), "w_zero_point": np.zeros(2, np.int8)},
        {"w_scale": np.ones((2, 1), np.float32), "w_zero_point": np.zeros((2, 1), np.int8)},
        {"w_scale": np.ones(3, np.float64)},
        {"w_zero_point": np.zeros(3, np.float32)},
        {"w_quantized": np.ones((2, 3), np.int32)},
        {"w_quantized": np.int8(1)},
    ],
    ids=str,
)
def test_an_onnx_kernel_whose_scale_does_not_fit_is_named(tmp_path, change):
    path = tmp_path / "a.onnx"
    write_onnx(path, INT8)
    np.testing.assert_array_equal(read_onnx(path)["m.kernel"], np.ones((2, 3)))
    write_onnx(path, {k: v for k, v in (INT8 | change).items() if v is not None})
    with pytest.raises(WeightsError, match="a scale and a zero point of the int8 kernel w_quant"):
        read_onnx(path)


def initialiser(**fields):
    def change(model):
        tensor = model.graph.initializer[0]
        for name, value in fields.items():
            if name in ("dims",):
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, name, value)

    return change


@pytest.mark.parametrize(
    "change, found",
    [
        (initialiser(data_type=99), "cannot be read"),
        (initialiser(data_type=0), "cannot be read"),
        (initialiser(dims=[2, 4]), "cannot be read"),
        (initialiser(dims=[-1, 3]), r"has the shape \[-1, 3\]"),
        (initialiser(dims=[1 << 40]), "cannot be read"),
        (lambda model: model.graph.initializer.append(model.graph.initializer[0]), "two tensors"),
        (lambda model: model.graph.node.append(model.graph.node[0]), "two kernels"),
    ],
)
def test_an_onnx_tensor_that_is_none_is_told(tmp_path, change, found):
    path = tmp_path / "a.onnx"
    write_onnx(path, {"c": VALUES}, node="MatMul", change=change)
    with pytest.raises(WeightsError, match=found):
        read_onnx(path)


def test_an_onnx_node_without_inputs_is_passed_over(tmp_path):
    path = tmp_path / "a.onnx"
    write_onnx(path, {"c": VALUES}, change=lambda model: model.graph.node[0].ClearField("input"))
    np.testing.assert_array_equal(read_onnx(path)["c"], VALUES)


@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "/etc/hostname", ""])
def test_onnx_tensors_in_other_files_are_not_read(tmp_path, monkeypatch, location):
    """Neither from the model's folder nor from the current one, which the library takes."""

    def kept_elsewhere(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in {"location": location, "length": "24"}.items():
            item = tensor.external_data.add()
            item.key, item.value = key, value

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(VALUES.tobytes())
    write_onnx(tmp_path / "a.onnx", {"c": VALUES}, change=kept_elsewhere)
    with pytest.raises(WeightsError, match=f"'c' is kept in another one .*{location}.*not read"):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, np.int8, np.bool_])
def test_every_dtype_that_numpy_and_bfloat16_know_is_read_as_it_is_stored(tmp_path, dtype):
    values = np.array([[1, -2], [0.5, 3]]).astype(dtype)
    save_file({"a": values}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", a=values)  # stores bfloat16 as nameless bytes
    for found in (read_safetensors(tmp_path / "a.safetensors"), read_npz(tmp_path / "a.npz")):
        assert found["a"].dtype == dtype
        np.testing.assert_array_equal(found["a"], values)


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 6), ("F8_E5M2", 6), ("F4", 3)])
def test_floats_that_need_scales_are_refused_in_one_sentence(tmp_path, dtype, size):
    path = tmp_path / "a.safetensors"
    tensor = entry(dtype=dtype, offsets=(0, size))
    path.write_bytes(safetensors_bytes({"a": tensor}, b"\0" * size))
    with pytest.raises(WeightsError, match=f"at least 16 bits, found {dtype}.* save the tensors"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content, found",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<HTML>", "web page"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x93NUMPY\1\0", r"single \.npy"),
        (b"\x80\x04\x95", "pickle"),
        (b"PK\3\4archive/data.pkl", "zip archive"),
    ],
)
def test_another_format_under_the_name_is_told(tmp_path, content, found):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"expected a \.safetensors file, found a.*{found}"):
        read_safetensors(path)
    save_file({"a": VALUES}, path)
    path.rename(tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"an \.npz file, found a \.safetensors file"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("reader", [read_npz, read_safetensors, read_onnx])
def test_a_forbidden_file_says_permission_and_not_damage(tmp_path, reader, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"x")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", forbidden)  # chmod does not stop root
    with pytest.raises(WeightsError, match="Permission denied") as caught:
        reader(path)
    assert "truncated" not in str(caught.value)


def sharded(folder, **changes):
    """Two shards and their index, as a hub folder has them."""
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: VALUES}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | changes}))
    return index


def test_shards_are_read_together(tmp_path):
    arrays = read_safetensors(sharded(tmp_path))
    assert sorted(arrays) == ["a", "b"]
    np.testing.assert_array_equal(arrays["b"], VALUES)


def test_an_absent_or_foreign_shard_is_named(tmp_path):
    index = sharded(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"2 shards beside it, found no m-00002-of-00002\.safe"):
        read_safetensors(index)
    index = sharded(tmp_path, b="model.safetensors.index.json")  # which would name itself again
    with pytest.raises(WeightsError, match="files that are no"):
        read_safetensors(index)
    index = sharded(tmp_path, b="m-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"m-00001-of-00002\.safetensors: expected the tensors"):
        read_safetensors(index)
    for outside in ("../m-00001-of-00002.safetensors", "", str(tmp_path / "x.safetensors"), 3):
        with pytest.raises(WeightsError, match="index of a sharded"):
            read_safetensors(sharded(tmp_path, b=outside))
    for content in (b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": [1]}', b"\xff"):
        index.write_bytes(content)
        with pytest.raises(WeightsError, match="index of a sharded"):
            read_safetensors(index)


def test_random_damage_never_gives_another_error(tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "compressed.npz", a=VALUES, b=np.arange(500.0))
    cases = [
        (tmp_path / "compressed.npz", read_npz),
        (GOLDEN / "vit_augreg.npz", read_npz),
        (GOLDEN / "vit_clip.safetensors", read_safetensors),
    ]
    for source, reader in cases:
        whole = source.read_bytes()
        path = tmp_path / f"damaged{source.suffix}"
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            # Headers are at the start of the one format and at the end of the other.
            for at in (*rng.integers(0, len(data), 3), rng.integers(0, min(300, len(data)))):
                data[at] = rng.integers(256)
            data[-min(200, len(data)) :: 50] = bytes(len(data[-min(200, len(data)) :: 50]))
            path.write_bytes(data)
            with contextlib.suppress(WeightsError):
                reader(path)
