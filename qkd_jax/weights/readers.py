"""Weight files to flat dicts `name -> NumPy array`. No reader runs code from the file.

The arrays keep their stored values; `load.assemble` checks names, shapes, dtypes and finiteness.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkd_jax.errors import WeightsError

Arrays = dict[str, np.ndarray]


def read_npz(path: Path) -> Arrays:
    """Read an uncompressed or compressed `.npz`; object arrays (pickles) are refused.

    The size that each array's header claims is compared with the stored bytes before memory is
    taken for it.

    Raises:
        WeightsError: not a zip, truncated, or a member that is no plain array.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as member:
                    arrays[info.filename.removesuffix(".npy")] = _read_npy(member, info)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise _damaged(path, "an .npz file", error) from error
    return arrays


def _read_npy(member, info: zipfile.ZipInfo) -> np.ndarray:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"{info.filename}: .npy version {version} is not supported")
    if dtype.hasobject:
        raise ValueError(f"{info.filename}: object arrays would need pickle and are refused")
    count = 1
    for size in shape:
        count *= int(size)
    claimed, stored = count * dtype.itemsize, info.file_size - member.tell()
    if claimed != stored:
        raise ValueError(f"{info.filename}: header claims {claimed} bytes, {stored} are stored")
    data = np.frombuffer(member.read(stored), dtype=dtype, count=count)
    return data.reshape(shape, order="F" if fortran_order else "C")


def read_safetensors(path: Path) -> Arrays:
    """Read a `.safetensors` file.

    Raises:
        WeightsError: bad header, overlapping or missing bytes, unknown dtype.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "a .safetensors file", error) from error


def read_onnx(path: Path) -> Arrays:
    """Read the initialisers of an ONNX graph.

    Tensors keep their names. The constant operand of a MatMul, and of a MatMulInteger with its
    scale and zero point, is an anonymous tensor: it is stored under the path of its node, as
    `<module path>.kernel`, [in, out], int8 ones as (q - zero point) * scale.

    Raises:
        WeightsError: not an ONNX file, or an int8 kernel without its scale.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except (DecodeError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path, "an .onnx file", error) from error
    if not stored:
        raise _damaged(path, "an .onnx file", ValueError("it holds no tensors"))
    consumed, kernels = set(), {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger") or node.input[1] not in stored:
            continue
        source = node.input[1]
        consumed.add(source)
        kernel = stored[source]
        if node.op_type == "MatMulInteger":
            base = source.removesuffix("_quantized")
            scale, zero = stored.get(f"{base}_scale"), stored.get(f"{base}_zero_point")
            if scale is None or zero is None or scale.shape != zero.shape:
                raise WeightsError(f"{path}: the int8 kernel {source} has no scale or zero point.")
            consumed |= {f"{base}_scale", f"{base}_zero_point"}
            # int8 differences are exact in float32, so this rounds once, as float kernels would.
            kernel = (kernel.astype(np.float32) - zero.astype(np.float32)) * scale
        module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
        kernels[f"{module}.kernel"] = kernel
    kept = {name: array for name, array in stored.items() if name not in consumed}
    return kept | kernels


READERS: dict[str, Callable[[Path], Arrays]] = {
    "augreg_npz": read_npz,
    "timm_safetensors": read_safetensors,
    "clip_onnx": read_onnx,
    "dinov2_onnx": read_onnx,
}


def _damaged(path: Path, kind: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} cannot be read as {kind}: {error}. It may be truncated or of another format; "
        "delete it and fetch it again."
    )
