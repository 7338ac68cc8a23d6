"""Reads weight files as flat dicts name -> NumPy array. No reader runs code from the file.

The arrays keep their stored values; `load.assemble` checks names, shapes, dtypes and finiteness.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from qkd_jax import npz
from qkd_jax.errors import WeightsError

Arrays = dict[str, np.ndarray]


class DamagedFile(WeightsError):
    """A weight file that can be opened but not read."""


def read_npz(path: Path) -> Arrays:
    """Reads a `.npz`, compressed or not; object arrays (pickles) are refused.

    NumPy stores bfloat16 as two untyped bytes, which are read as bfloat16 again.

    Raises:
        WeightsError: see `qkd_jax.npz.read_npz`.
    """
    with _reading(path, "an .npz file"):
        return {
            name: array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
            for name, array in npz.read_npz(path).items()
        }


def read_safetensors(path: Path) -> Arrays:
    """Reads a `.safetensors` file, or all shards that a `.safetensors.index.json` names.

    Raises:
        WeightsError: bad header, overlapping or missing bytes, an unknown dtype or one of fewer
            than 16 bits; for shards also one that is absent, or an index that does not fit them.
    """
    if path.suffix.lower() == ".json":
        return _read_shards(path)
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with _reading(path, "a .safetensors file"):
        with safe_open(path, framework="numpy") as file:
            dtypes = [file.get_slice(name).get_dtype() for name in file.keys()]
        small = sorted({dtype for dtype in dtypes if dtype.startswith(("F4", "F6_", "F8"))})
        if small:
            raise WeightsError(
                f"{path}: expected tensors of at least 16 bits, found {', '.join(small)}, whose "
                "values need scales that this library does not apply; save the tensors as "
                "bfloat16, float16 or float32."
            )
        return load_file(path)


def read_bert(path: Path) -> Arrays:
    """Reads a `.safetensors` file of a BERT; LayerNorms of older files say gamma and beta."""
    newer = {"gamma": "weight", "beta": "bias"}

    def renamed(name):
        parent, _, leaf = name.rpartition(".")
        return f"{parent}.{newer[leaf]}" if parent.endswith("LayerNorm") and leaf in newer else name

    return {renamed(name): array for name, array in read_safetensors(path).items()}


def _read_shards(index: Path) -> Arrays:
    with _reading(index, "the index of a sharded .safetensors file"):
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not shards or any(Path(name).name != name for name in shards):
            raise ValueError("weight_map names no files of its own folder")
        if not all(name.lower().endswith(".safetensors") for name in shards):
            raise ValueError("weight_map names files that are no .safetensors")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise WeightsError(
            f"{index}: expected {len(shards)} shards beside it, found no "
            f"{_some(absent)}; download what is absent."
        )
    arrays: Arrays = {}
    for name in shards:
        shard = read_safetensors(index.parent / name)
        wrong = sorted({t for t, home in weight_map.items() if home == name} ^ set(shard))
        if wrong:
            raise WeightsError(
                f"{index.parent / name}: expected the tensors that {index.name} lists for it, "
                f"found a difference in {_some(wrong)}; download the folder again."
            )
        arrays |= shard
    return arrays


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_onnx(path: Path) -> Arrays:
    """Reads the initialisers of an ONNX graph.

    Tensors keep their names, except the constant operands of MatMul and MatMulInteger, which are
    anonymous: they get the path of their node, `<module path>.kernel`, [in, out]. Int8 ones become
    (q - zero point) * scale.

    Raises:
        WeightsError: not an ONNX file, a tensor that is kept in another file, a name twice, or an
            int8 kernel whose scale and zero point are missing or do not fit.
    """
    import onnx

    with _reading(path, "an .onnx file"):
        graph = onnx.load(str(path), load_external_data=False).graph
        stored: Arrays = {}
        for tensor in graph.initializer:
            if tensor.name in stored:
                raise ValueError(f"two tensors of the name {tensor.name!r}")
            stored[tensor.name] = _stored(tensor, path)
        if not stored:
            raise ValueError("it holds no tensors")
        return _named_by_module(graph, stored, path)


def _stored(tensor, path: Path) -> np.ndarray:
    """The values of one tensor, which are in the file itself."""
    from onnx import TensorProto, numpy_helper

    # The library would look for the other file in the current folder.
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        places = [item.value for item in tensor.external_data if item.key == "location"]
        raise WeightsError(
            f"{path}: expected all tensors in the file itself, found that {tensor.name!r} is kept "
            f"in another one ({', '.join(map(repr, places[:1])) or 'not named'}), which is not "
            "read. Save the model in one file (onnx.save without save_as_external_data)."
        )
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"{tensor.name!r} has the shape {list(tensor.dims)}")
    return numpy_helper.to_array(tensor)


def _named_by_module(graph, stored: Arrays, path: Path) -> Arrays:
    consumed, kernels = set(), {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger") or len(node.input) < 2:
            continue
        source = node.input[1]
        if source not in stored:
            continue
        consumed.add(source)
        kernel = stored[source]
        if node.op_type == "MatMulInteger":
            base = source.removesuffix("_quantized")
            scale, zero = stored.get(f"{base}_scale"), stored.get(f"{base}_zero_point")
            if (
                scale is None
                or zero is None
                or scale.shape != zero.shape
                or scale.shape not in ((), (1,), kernel.shape[1:])
                or scale.dtype != np.float32
                or not {kernel.dtype.name, zero.dtype.name} <= {"int8", "uint8"}
            ):
                raise WeightsError(
                    f"{path}: expected a scale and a zero point of the int8 kernel {source}, "
                    "one for all or one for each column, found none that fit."
                )
            consumed |= {f"{base}_scale", f"{base}_zero_point"}
            # int8 differences are exact in float32, so this rounds once, as float kernels would. It
            # is done in place, since first touching new memory costs more than the arithmetic.
            kernel = kernel.astype(np.float32)
            kernel -= zero.astype(np.float32)
            kernel *= scale
        module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
        name = f"{module}.kernel"
        if name in kernels:
            raise ValueError(f"two kernels of the module {module!r}")
        kernels[name] = kernel
    kept = {name: array for name, array in stored.items() if name not in consumed}
    if both := kept.keys() & kernels.keys():
        raise ValueError(f"two tensors of the name {min(both)!r}")
    return kept | kernels


READERS: dict[str, Callable[[Path], Arrays]] = {
    "augreg_npz": read_npz,
    "timm_safetensors": read_safetensors,
    "clip_onnx": read_onnx,
    "dinov2_onnx": read_onnx,
    "bert_safetensors": read_bert,
}


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Turns whatever a library raises on a file into a WeightsError."""
    try:
        # Not all libraries distinguish a forbidden file from a damaged one.
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a file that you may read, found: {error.strerror or error}."
        ) from error
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # parsers raise many types on damaged bytes
        found = _recognised(start, path.suffix.lower())
        found = found or f"one that cannot be read ({error}), truncated or of another format"
        raise DamagedFile(f"{path}: expected {expected}, found {found}.") from error


def _recognised(start: bytes, suffix: str) -> str | None:
    """What the file is instead of a weight file, by its first bytes; None = not recognised."""
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; fetch the file it stands for (git lfs pull)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page; download the file itself"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if start.startswith(b"\x93NUMPY"):
        return "a single .npy array"
    if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
        return "a Python pickle, whose reading would run code"
    if start.startswith(b"PK\3\4") and suffix != ".npz":
        return "a zip archive, as .npz and PyTorch files are"
    if start[8:9] == b"{" and suffix != ".safetensors":
        return "a .safetensors file"
    return None
