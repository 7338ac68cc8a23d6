# %%
# The address to clone qkd_jax from; a notebook that is opened inside a checkout needs none.
REPOSITORY = "ADDRESS"

# Where results go. In Colab, a mounted Drive folder outlives the runtime:
#   from google.colab import drive; drive.mount("/content/drive"); RUNS = "/content/drive/MyDrive/qkd_jax_runs"
RUNS = "runs"

import os

SMOKE = os.environ.get("QKD_JAX_SMOKE") == "1"  # a tiny run on the CPU, to see that everything works
if SMOKE:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

devices = jax.local_devices()
print(f"jax {jax.__version__} on {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
if jax.default_backend() == "cpu" and not SMOKE:
    print("""
    Only the CPU is in use: fine for the small parts, slow for whole runs.

    In Colab:          Runtime -> Change runtime type -> choose a TPU (or GPU), then start again here.
    On a TPU machine:  pip install -U "jax[tpu]",    then restart the kernel.
    With a GPU:        pip install -U "jax[cuda13]", then restart the kernel.
    If TensorFlow was imported before jax, it may hold the TPU: restart the kernel.
""")

# %%
# The installed JAX fits this machine's accelerator, so it stays: everything else is installed around it. TensorFlow is
# neither needed nor installed.
import importlib.util
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def checkout():
    """The folder of a checkout that we stand in, or None."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "qkd_jax").is_dir() and (folder / "pyproject.toml").is_file():
            return folder


# The oldest that are tested.
PYTHON, JAX = (3, 11), (0, 7, 2)

if sys.version_info < PYTHON or tuple(map(int, re.findall(r"\d+", version("jax"))[:3])) < JAX:
    raise RuntimeError(
        f"qkd_jax needs Python {'.'.join(map(str, PYTHON))} and jax {'.'.join(map(str, JAX))} or newer; here are "
        f"Python {sys.version.split()[0]} and jax {version('jax')}. In Colab: Runtime -> Disconnect and delete runtime, "
        "then start again, on the newest runtime. Elsewhere: pip install -U 'jax[tpu]' or 'jax[cuda13]', then restart "
        "the kernel."
    )
if importlib.util.find_spec("qkd_jax") is None:
    folder = checkout()
    if folder is None:
        if "/OWNER/" in REPOSITORY:
            raise RuntimeError("Put the address of the qkd_jax repository into REPOSITORY, in the cell above.")
        folder = Path("qkd_jax_checkout").resolve()
        if not folder.is_dir():
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(folder)], check=True)
    # What is here and fits this machine's accelerator stays as it is.
    kept = [name for name in ("jax", "jaxlib", "libtpu") if importlib.util.find_spec(name)]
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in kept))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*pip, "--editable", str(folder)], check=True)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()

import qkd_jax

for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
    print(f"{name:18}{version(name)}")
