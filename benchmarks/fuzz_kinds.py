"""The kinds of files that are fuzzed: valid examples, how they are changed, and who reads them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.mutations import mutated, mutated_json

Change = Callable[[bytes, np.random.Generator], bytes]


class Kind(NamedTuple):
    """Attributes:
    examples: valid files by name.
    change: the mutation of one of them.
    read: (name, content, an empty folder) -> reads it as a user's file would be read.
    """

    examples: dict[str, bytes]
    change: Change
    read: Callable[[str, bytes, Path], object]


VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


def npz() -> Kind:
    from qkd_jax.npz import read_npz

    def saved(save: Callable) -> bytes:
        file = io.BytesIO()
        save(file, a=VALUES, text=np.array(["cat", "dog"]), one=np.int64(3), flag=VALUES > 3)
        return file.getvalue()

    examples = {"stored.npz": saved(np.savez), "deflated.npz": saved(np.savez_compressed)}
    return Kind(examples, mutated, lambda name, data, _: read_npz(name, content=data))


def safetensors() -> Kind:
    from safetensors.numpy import save

    from qkd_jax.weights.readers import read_safetensors

    def read(name: str, data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read_safetensors(folder / name)

    return Kind({"a.safetensors": save({"a": VALUES, "b": VALUES[0]})}, mutated, read)


def onnx() -> Kind:
    from onnx import helper, numpy_helper

    from qkd_jax.weights.readers import read_onnx

    constants = {
        "c": VALUES,
        "w_quantized": VALUES.astype(np.int8),
        "w_scale": VALUES[0],
        "w_zero_point": np.zeros(6, np.int8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "c"], ["y"], name="/a/MatMul"),
        helper.make_node("MatMulInteger", ["y", "w_quantized", "z", "w_zero_point"], ["o"], "/b/M"),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))

    def read(name: str, data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read_onnx(folder / name)

    return Kind({"a.onnx": model.SerializeToString()}, mutated, read)


def config() -> Kind:
    from qkd_jax.reports.files import read_json
    from qkd_jax.settings.config import Config, from_dict, to_dict

    def read(_: str, data: bytes, folder: Path) -> object:
        (folder / "config.json").write_bytes(data)
        return from_dict(read_json(folder / "config.json"))

    examples = {
        method: json.dumps(to_dict(Config(method=method, experiment="fuzz"))).encode()
        for method in ("qkd", "l2p", "ranpac", "cdl", "qd_llm")
    }
    return Kind(examples, mutated_json, read)


def run() -> Kind:
    """A run folder of which one file is changed; its page and table are made from it."""
    from qkd_jax.protocol import metrics
    from qkd_jax.reports.files import read_run
    from qkd_jax.reports.run_page import page_of
    from qkd_jax.reports.tables import console_table

    correct, total = np.array([[4, 0], [3, 4]]), np.array([[5, 0], [5, 5]])
    task = np.repeat([0, 1], 5)
    stage = io.BytesIO()
    relevance = np.eye(2, dtype=np.float32)[task]
    np.savez(stage, id=task.astype(str), label=task, task=task, predicted=task, relevance=relevance)
    log = {"task": 0, "step": 1, "epoch": 0, "images_seen": 8, "loss": 0.5}
    example = {"id": "a", "class": "cat", "predicted": "dog", "task": 1, "most_relevant_task": 2}
    summary = metrics.summarise(correct, total) | {
        **{"experiment": "fuzz", "method": "qkd", "variant": "", "seed": 1, "finished": True},
        **{"wall_seconds": 1.5, "parameters": {"adapter": 5}, "student": "a"},
    }
    teacher = {k: summary[k] for k in ("accuracy_curve", "average_accuracy", "last_accuracy")}
    contents = {
        "summary.json": summary | {"teacher": teacher},
        "matrix.json": {"correct": correct.tolist(), "total": total.tolist()},
        "environment.json": {"weights_fingerprint": "ab", "leaked_test_images": [["a", "b"]]}
        | {"cut_texts": [1, 2], "removed_images": ["c"], "examples": "images"},
        "config.json": {"method": "qkd", "seed": 1, "train": {"epochs": 2}},
        "examples.json": {"after_task": 1, "test": [example, example | {"text": "a cat"}]},
    }
    examples = {name: json.dumps(value).encode() for name, value in contents.items()}
    lines = [json.dumps(log | {"step": step}) + "\n" for step in (1, 2, 3)]
    examples["metrics.jsonl"] = "".join(lines).encode()
    examples["predictions/after_task_1.npz"] = stage.getvalue()

    def change(data: bytes, rng: np.random.Generator) -> bytes:
        return (mutated_json if data[:1] == b"{" and b"\n" not in data else mutated)(data, rng)

    def read(name: str, data: bytes, folder: Path) -> object:
        (folder / "predictions").mkdir(exist_ok=True)
        for other, content in (examples | {name: data}).items():
            if other == name or not (folder / other).exists():
                (folder / other).write_bytes(content)
        try:
            files = read_run(folder)
            console_table(files.summary, files.correct, files.total)
            return page_of(files)
        finally:
            (folder / name).write_bytes(examples[name])

    return Kind(examples, change, read)


def image() -> Kind:
    from qkd_jax.data.images import centre_view, decode

    colour = np.random.default_rng(0).integers(0, 256, (20, 24, 4), np.uint8)
    pictures = {"RGBA": Image.fromarray(colour), "RGB": Image.fromarray(colour[..., :3].copy())}
    pictures |= {mode: pictures["RGB"].convert(mode) for mode in ("P", "L", "CMYK", "1")}
    pictures["I;16"] = Image.fromarray(colour[..., 0].astype(np.uint16) << 8)
    Image.init()
    examples = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "ICO"):
        for mode, picture in pictures.items():
            file = io.BytesIO()
            try:
                picture.save(file, kind)
            except (OSError, KeyError, ValueError):  # not of this mode, or not installed
                continue
            examples[f"{mode}.{kind.lower()}"] = file.getvalue()

    def read(name: str, data: bytes, _: Path) -> object:
        return centre_view(decode(data, name), 14, 16)

    return Kind(examples, mutated, read)


def text() -> Kind:
    """Lines, tables and files of splits."""
    from qkd_jax.data.splits import read_split_file
    from qkd_jax.data.text_files import open_texts

    examples = {
        "train/cat.txt": "a small cat\nanother cat\nein Kätzchen\n".encode(),
        "train.csv": b'text,label\n"a cat, small",cat\na dog,dog\n',
        "train.tsv": b"text\tlabel\na cat\tcat\na dog\tdog\n",
        "split.txt": "a\ttrain\n# note\nb/ä.jpg\ttest\r\n".encode(),
    }

    def read(name: str, data: bytes, folder: Path) -> object:
        if name == "split.txt":
            (folder / name).write_bytes(data)
            return read_split_file(folder / name, ["a", "b/ä.jpg"])
        root = folder / name.replace("/", "_")
        for part in ("train", "test"):
            file = root / name.replace("train", part)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data if part == "train" else examples[name])
        return open_texts(root)

    return Kind(examples, mutated, read)


KINDS: dict[str, Callable[[], Kind]] = {
    made.__name__: made for made in (npz, safetensors, onnx, config, run, image, text)
}
