# %% [markdown]
# # Your own images
#
# From a folder of images to a report, predictions, and a small service that answers over HTTP. Put the path of your own
# folder into `IMAGES`: it has `train/<class>/*` and `test/<class>/*`. Files may be JPEG, PNG, WebP, BMP, GIF or TIFF, of any
# size.

# %%
IMAGES = ""  # for example "/content/drive/MyDrive/birds"

# %% [markdown]
# Without one, the notebook writes a folder of emoji, with the usual mess: spaces in names, several sizes and formats, and
# one file that is no image.

# %%
import numpy as np
from PIL import Image

from qkd_jax.data.sources import load_split

backbone = qkd_jax.load_backbone("tiny_random" if SMOKE else "clip_vit_b16", image_size=32 if SMOKE else 96)
made_up = not IMAGES
if made_up:
    IMAGES = "my images"
    data, count = load_split("synthetic" if SMOKE else "renditions"), 4 if SMOKE else 8
    for part, split in (("train", data.train), ("test", data.test)):
        rows = np.flatnonzero(split.labels < count)
        for row, pixels in zip(rows, split.load(rows, backbone)["image"]):
            folder = Path(IMAGES) / part / split.class_names[split.labels[row]]
            folder.mkdir(parents=True, exist_ok=True)
            kind, edge = ("png", 96) if row % 3 else ("tiff", 140)
            Image.fromarray(pixels).resize((edge, edge)).save(folder / f"image {row}.{kind}")
    (sorted((Path(IMAGES) / "train").iterdir())[0] / "broken.jpg").write_bytes(b"not an image")
print(*sorted(str(path) for path in Path(IMAGES).glob("*/*")), sep="\n")

# %% [markdown]
# ## Check before you train
#
# `data check` reads every file as a run would, and names what cannot be read. A run does the same before its first step.

# %%
from qkd_jax.cli import main

if main(["data", "check", IMAGES]):
    for path in Path(IMAGES).rglob("broken.jpg") if made_up else ():
        path.unlink()
        print(f"removed {path}")
    if main(["data", "check", IMAGES]):
        raise RuntimeError("Some files cannot be read; they are named above.")

# %% [markdown]
# ## Train
#
# Two tasks of as many classes each. Names of classes are those of the folders. The same command continues a run that was
# stopped, and refuses to if the images have changed.

# %%
num_classes = len([path for path in (Path(IMAGES) / "train").iterdir() if path.is_dir()])
tiny = ["--set", "backbone.name=tiny_random", "--set", "backbone.image_size=32", "--set", "gate.num_qubits=5"]
tiny += ["--set", "adapter.first_block=0"]
command = ["run", "folder", "--data", IMAGES, "--out", RUNS, "--set", f"data.num_classes={num_classes}"]
command += ["--set", f"protocol.increment={-(-num_classes // 2)}", "--set", "train.epochs=5"]
command += ["--set", "train.batch_size=8", *(tiny if SMOKE else [])]
if main(command):
    raise RuntimeError("Stopped; the reason stands above. Running this cell again continues the run.")

# %% [markdown]
# ## The report
#
# `report.html` opens from disk, in any browser, without a network: accuracies and forgetting, relevance by task, the worst
# confusions, hits and misses.

# %%
from IPython.display import Image as Picture
from IPython.display import display

folder = Path(RUNS) / "folder" / "qkd" / "seed1993"
print(folder / "report.html", f"{(folder / 'report.html').stat().st_size / 1024:.0f} kB")
display(Picture(folder / "figures" / "accuracy_curve.png", width=520))

# %% [markdown]
# ## Ask it
#
# `predict` names the best classes of image files, the task that each was learned in, and how sure it is. No task is given.

# %%
files = sorted(str(path) for path in (Path(IMAGES) / "test").rglob("*.*"))[:: max(1, num_classes)][:4]
if main(["predict", str(folder), *files]):
    raise RuntimeError("No answer; the reason stands above.")

# %% [markdown]
# ## Take it with you
#
# `export` writes the learned arrays, the settings and a model card into one folder; the frozen transformer stays where it
# is. `serve` answers over HTTP, on this machine alone unless it is told otherwise.

# %%
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

if main(["export", str(folder), "my_model"]):
    raise RuntimeError("Not exported; the reason stands above.")
print(*sorted(path.name for path in Path("my_model").iterdir()), sep="  ")

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen([sys.executable, "-m", "qkd_jax", "serve", "my_model", "--port", str(port)])
address = f"http://127.0.0.1:{port}"
local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    for _ in range(120):
        try:
            local.open(f"{address}/health").read()
            break
        except urllib.error.URLError:
            time.sleep(1)
    request = urllib.request.Request(f"{address}/predict?top=2", data=Path(files[0]).read_bytes())
    print(files[0], json.dumps(json.load(local.open(request)), indent=1), sep="\n")
finally:
    server.terminate()
    server.wait()

# %% [markdown]
# ## Next
#
# - Which method? `main(["compare", "folder", "--data", IMAGES, "--methods", "qkd mos ranpac simplecil"])` measures several on
#   your images and writes one page with all of them.
# - More epochs, larger images: `"--set", "train.epochs=20"`, `"--set", "backbone.image_size=224"`.
# - Settings are chosen on training images: `"--set", "data.validation=0.2"` holds a fifth of them back and tests on those.
