"""Finds the weight file that a user means, and its format."""

import stat
from pathlib import Path

from qkd_jax.errors import WeightsError
from qkd_jax.weights.registry import Entry

_INDEX = ".safetensors.index.json"
_READABLE = (".npz", ".safetensors", ".onnx")
_RUN_CODE = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".keras")


def find_file(given: Path, entry: Entry, setting: str) -> Path:
    """The weight file that the user means.

    In a folder it is the first of: the registered file name, `model.safetensors`, the index of a
    sharded model, the only `.safetensors`, `.npz` or `.onnx` file. A hub's cache folder keeps
    revisions under `snapshots/`, of which there must be one.

    Args:
        given: a file or a folder.
        entry: the transformer it is for.
        setting: where `given` comes from, for errors.

    Raises:
        WeightsError: nothing there, no permission, or several files to choose from.
    """
    wanted = f"a weight file, or a folder that holds {entry.file} or model.safetensors"
    try:
        mode = given.stat().st_mode
        if stat.S_ISDIR(mode):
            names = sorted(path.name for path in given.iterdir() if path.is_file())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise WeightsError(
            f"{setting}: expected {wanted}, found nothing at {given}. Correct it, or leave it "
            f"unset to fetch {entry.name}."
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{setting}: expected {wanted}, found {given}, which cannot be opened "
            f"({error.strerror or error})."
        ) from error
    if stat.S_ISDIR(mode) and (given / "snapshots").is_dir():
        revisions = sorted(path for path in (given / "snapshots").iterdir() if path.is_dir())
        if len(revisions) != 1:
            listed = ", ".join(path.name for path in revisions[:10]) or "none"
            raise WeightsError(
                f"{setting}: expected one revision in {given / 'snapshots'}, found "
                f"{len(revisions)}: {listed}. Give the folder of one of them."
            )
        return find_file(revisions[0], entry, setting)
    if stat.S_ISDIR(mode):
        visible = [name for name in names if not name.startswith(".")]
        return given / _choose(visible, given, entry, setting)
    if not stat.S_ISREG(mode):
        raise WeightsError(f"{setting}: expected {wanted}, found no plain file at {given}.")
    return given


def _choose(names: list[str], folder: Path, entry: Entry, setting: str) -> str:
    for name in (entry.file, "model.safetensors"):
        if name in names:
            return name
    found = [name for name in names if name.lower().endswith(_INDEX)]
    found = found or [name for name in names if name.lower().endswith(_READABLE)]
    if len(found) > 1:
        listed = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise WeightsError(
            f"{setting}: expected one weight file in {folder}, found {len(found)}: {listed}. "
            "Give the file itself."
        )
    if found:
        return found[0]
    for name in names:
        if name.lower().endswith(_RUN_CODE):
            raise _runs_code(folder / name)
    raise WeightsError(
        f"{setting}: expected {entry.file}, model.safetensors or another .safetensors, .npz or "
        f".onnx file in {folder}, found none."
    )


def format_of(entry: Entry, file: Path) -> str:
    """The key of `READERS` and `KEY_MAPS`; the file name's ending decides.

    Raises:
        WeightsError: another ending; for files that can run code, says how to convert them.
    """
    suffix, reads_text = file.suffix.lower(), entry.tokenizer is not None
    if suffix == ".onnx" and entry.format.endswith("_onnx"):
        return entry.format
    if suffix == ".safetensors" or file.name.lower().endswith(_INDEX):
        return entry.format if reads_text else "timm_safetensors"
    if suffix == ".npz" and not reads_text:
        return "augreg_npz"
    if suffix in _RUN_CODE:
        raise _runs_code(file)
    expected = ".safetensors, .npz or its registered .onnx"
    if not entry.format.endswith("_onnx"):
        expected = ".safetensors" if reads_text else ".safetensors or .npz"
    raise WeightsError(
        f"{file}: expected the ending {expected} for {entry.name}, found {suffix or 'none'}."
    )


def _runs_code(file: Path) -> WeightsError:
    return WeightsError(
        f"{file}: expected a .safetensors, .npz or .onnx file, found {file.suffix}, whose reading "
        "can run code that it holds; open it where you trust it and save its tensors as "
        "safetensors (safetensors.torch.save_file(state_dict, 'model.safetensors'))."
    )
