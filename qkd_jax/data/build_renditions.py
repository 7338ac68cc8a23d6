"""Builds `renditions.npz`: 100 emoji classes, each drawn once in nine styles by five artists.

Run from a checkout, with npm on the path and `pip install resvg-py==0.5.0`:

    python -m qkd_jax.data.build_renditions

The sources are the pinned npm packages of `SETS` (only unpacked, none of their code is run). The
classes are chosen by a rule, not by hand:

1. a name of noto's categories `CATEGORIES` that every other set has under the same name (fxemoji:
   without the hyphens, or as `FXEMOJI_NAMES` says);
2. not in a family of look-alikes (`FAMILIES`: heads of animals that also appear whole, clock faces,
   moon phases, mailboxes, banknotes, ...), and not in `UNLIKE`, names under which the sets do not
   draw the same thing or draw another class;
3. in the order of sha256(name), skipping every name whose drawing correlates by more than
   `LOOK_ALIKE` with one already taken (mean over the styles, grey, 24 x 24 px), until 100 are.
"""

import hashlib
import io
import json
import pathlib
import re
import subprocess
import tarfile
import tempfile
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 128
NUM_CLASSES = 100
LOOK_ALIKE = 0.72
HERE = pathlib.Path(__file__).parent


class DrawingSet(NamedTuple):
    """One npm package of drawings, and what its licence requires to be named."""

    version: str
    sha256: str
    artist: str
    licence: str
    origin: str
    split: str


# Drawings of one artist are never on both sides of the split: noto and noto-v1, the three Fluent
# sets, and the two EmojiOne sets are siblings.
SETS = {
    "noto": DrawingSet(
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Google",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
        "train",
    ),
    "noto-v1": DrawingSet(
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Google",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
        "train",
    ),
    "fluent-emoji": DrawingSet(
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "Microsoft",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "train",
    ),
    "fluent-emoji-flat": DrawingSet(
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "Microsoft",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "train",
    ),
    "fluent-emoji-high-contrast": DrawingSet(
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "Microsoft",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "train",
    ),
    "fxemoji": DrawingSet(
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Mozilla",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
        "train",
    ),
    "twemoji": DrawingSet(
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "Twitter and other contributors",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
        "test",
    ),
    "emojione": DrawingSet(
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "Emoji One (EmojiTwo)",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
        "test",
    ),
    "emojione-monotone": DrawingSet(
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "Emoji One (EmojiTwo)",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
        "test",
    ),
}

CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")

# The same character under fxemoji's own name; its `cat` is a face and `catside` the animal.
FXEMOJI_NAMES = {
    "basketball": "basketballandhoop",
    "camel": "dromedarycamel",
    "castle": "europeancastle",
    "cat": "catside",
    "dog": "dogside",
    "dove": "doveofpeace",
    "dragon": "dragonside",
    "ear-of-corn": "earofmaize",
    "eggplant": "aubergine",
    "evergreen-tree": "evergreen",
    "flashlight": "electrictorch",
    "gem-stone": "gem",
    "high-heeled-shoe": "heels",
    "hot-pepper": "chilipepper",
    "hourglass-done": "hourglass",
    "house": "housebuilding",
    "kitchen-knife": "hocho",
    "leopard": "leopardside",
    "locomotive": "steamlocomotive",
    "magnifying-glass-tilted-left": "leftmagnifyingglass",
    "moai": "moyai",
    "mouse": "mouseside",
    "necktie": "tie",
    "pig": "pigside",
    "pig-nose": "pigsnout",
    "pizza": "sliceofpizza",
    "pool-8-ball": "billiards",
    "rabbit": "bunnyside",
    "sake": "sakebottleandcup",
    "scissors": "blackscissors",
    "t-shirt": "mansshirt",
    "telephone": "blacktelephone",
    "tennis": "tennisball",
    "tiger": "tigerside",
    "tokyo-tower": "toykotower",
    "wolf": "wolfface",
    "wrapped-gift": "present",
}

FAMILIES = re.compile(
    r"-face|moon|clock$|thirty$|mailbox|-tray|banknote|yen|globe|chart|folder|card-|-card|volume"
    r"|speaker|envelope|e-mail|notebook|notepad|page|calendar|clipboard|memo|newspaper|label"
    r"|-book$|^books$|bookmark|ledger|lock|musical|cloud|sun-|sunrise|sunset|oncoming|-medal|suit"
    r"|umbrella-|cityscape|night|station|-office|hotel|store|office|railway|tramway|mountain-"
    r"|bus$|taxi|tram|train|trolley|rail|metro|clinking|-chick|womans|mans-|mobile|pager|fax"
    r"|optical|dvd|disk|videocassette|link|key$|tear|flower-playing|mahjong|ceremony|dolls"
    r"|streamer|decoration|tanabata|wind-chime|fish-cake|rice-|dango|oden|curry|cooked|custard"
    r"|bento|seat|hole|construction|foggy|fog$|wedding|running-shirt|ticket|reminder|framed"
)

# Seen on a contact sheet: one set draws a piano for the keyboard, some a hen for the rooster, and
# the white flower is a stamp of a blossom, with writing on it in two sets.
UNLIKE = frozenset({"keyboard", "rooster", "white-flower"})


def fetch_package(package: str, sha256: str, folder: pathlib.Path) -> tarfile.TarFile:
    """The archive of one npm package, such as `name@1.2.3`, fetched and checked."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    packed = subprocess.run(command, check=True, capture_output=True, text=True)
    archive = folder / packed.stdout.split()[-1]
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{package}: expected sha256 {sha256}, found {found}")
    return tarfile.open(archive)


def download(folder: pathlib.Path) -> dict[str, dict]:
    """Fetches and checks each package; returns its icons and categories by set name."""
    drawings = {}
    for name, source in SETS.items():
        package = f"@iconify-json/{name}@{source.version}"
        with fetch_package(package, source.sha256, folder) as members:
            read = {
                part: json.load(members.extractfile(f"package/{part}.json"))
                for part in ("icons", "metadata")
            }
        drawings[name] = read["icons"] | {"categories": read["metadata"].get("categories", {})}
    return drawings


def local_name(style: str, name: str) -> str:
    """The name of the class `name` in a set."""
    if style != "fxemoji":
        return name
    return FXEMOJI_NAMES.get(name, name.replace("-", ""))


def render(drawings: dict, name: str) -> Image.Image:
    """Draws one icon on a white square of `SIDE` pixels; a one-colour drawing becomes black."""
    import resvg_py

    icon = drawings["icons"][name]
    sizes = [
        icon.get(field, drawings.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}" viewBox="{" ".join(map(str, sizes))}" color="black">'
        f"{icon['body']}</svg>"
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    if canvas.size != (SIDE, SIDE):
        raise SystemExit(f"{name}: drawn at {canvas.size}, expected {(SIDE, SIDE)}")
    return canvas.convert("RGB")


def candidates(drawings: dict[str, dict]) -> list[str]:
    """Names that pass steps 1 and 2 of the rule, in the order of step 3."""
    noto = drawings["noto"]["categories"]
    names = {name for category in CATEGORIES for name in noto[category]}
    names = {
        name
        for name in names
        if all(local_name(style, name) in icons["icons"] for style, icons in drawings.items())
    }
    names = {name for name in names if not FAMILIES.search(name) and name not in UNLIKE}
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def choose(drawings: dict[str, dict]) -> dict[str, dict[str, Image.Image]]:
    """Step 3: the first `NUM_CLASSES` candidates that do not look like one already taken."""
    chosen, looks = {}, []
    for name in candidates(drawings):
        images = {style: render(drawings[style], local_name(style, name)) for style in SETS}
        small = np.stack(
            [
                np.asarray(image.convert("L").resize((24, 24), Image.Resampling.BOX), np.float64)
                for image in images.values()
            ]
        )
        if small.std(axis=(1, 2)).min() < 10.0:
            raise SystemExit(f"{name}: a drawing is nearly blank; add it to UNLIKE")
        look = small.mean(axis=0).ravel()
        look = (look - look.mean()) / np.linalg.norm(look - look.mean())
        if looks and max(float(look @ other) for other in looks) > LOOK_ALIKE:
            continue
        looks.append(look)
        chosen[name] = images
        if len(chosen) == NUM_CLASSES:
            return dict(sorted(chosen.items()))
    raise SystemExit(f"only {len(chosen)} classes pass the rule, expected {NUM_CLASSES}")


def pack(chosen: dict[str, dict[str, Image.Image]], path: pathlib.Path) -> str:
    """Writes the images as concatenated lossless WebP; returns the sha256 of the file."""
    blobs, labels, styles = [], [], []
    for label, images in enumerate(chosen.values()):
        for style, image in enumerate(images.values()):
            blob = io.BytesIO()
            image.save(blob, "WEBP", lossless=True, quality=100, method=6)
            blobs.append(blob.getvalue())
            labels.append(label)
            styles.append(style)
    np.savez(
        path,
        bytes=np.frombuffer(b"".join(blobs), np.uint8),
        offsets=np.cumsum([0, *map(len, blobs)], dtype=np.int64),
        labels=np.array(labels, np.int32),
        styles=np.array(styles, np.int32),
        class_names=np.array([name.replace("-", " ") for name in chosen]),
        style_names=np.array(list(SETS)),
        test_styles=np.array([source.split == "test" for source in SETS.values()]),
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attribution(sha256: str, size: int, class_names: list[str]) -> str:
    """The page of attributions that the licences require."""
    rows = "\n".join(
        f"| {name} | {source.split} | {source.artist}, {source.origin} | {source.licence} "
        f"| `@iconify-json/{name}@{source.version}` | `{source.sha256}` |"
        for name, source in SETS.items()
    )
    return f"""# Renditions: where the drawings come from

`renditions.npz` ({size:,} bytes, sha256 `{sha256}`) holds {len(class_names)} classes of emoji in
{len(SETS)} drawing styles, rendered on white at {SIDE} x {SIDE} pixels. Changes to the originals:
SVG drawings were rasterised, one-colour drawings are black on white; nothing else was changed.
It is written by `python -m qkd_jax.data.build_renditions`, which states the rule of the choice.

The split is by artist: the styles to test on come from artists of whom nothing is trained on.

| style | split | artist and origin | licence | npm package | sha256 of the package |
| --- | --- | --- | --- | --- | --- |
{rows}

Licences: Apache-2.0 <https://www.apache.org/licenses/LICENSE-2.0>, MIT (Copyright (c) Microsoft
Corporation) <https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE>, CC-BY-4.0
<https://creativecommons.org/licenses/by/4.0/>. No share-alike set is used.

Classes: {", ".join(class_names)}.
"""


def main() -> None:
    """Builds both files beside this one and prints the hash that `packaged.py` must hold."""
    with tempfile.TemporaryDirectory() as folder:
        drawings = download(pathlib.Path(folder))
    chosen = choose(drawings)
    path = HERE / "renditions.npz"
    sha256 = pack(chosen, path)
    size = path.stat().st_size
    names = [name.replace("-", " ") for name in chosen]
    (HERE / "RENDITIONS_ATTRIBUTION.md").write_text(attribution(sha256, size, names))
    print(f"{path}: {size:,} bytes, {len(names)} classes, sha256 {sha256}")


if __name__ == "__main__":
    main()
