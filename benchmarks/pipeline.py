"""Reading, decoding and augmenting JPEGs: images a second beside PyTorch's loader and our own step.

    python -m benchmarks.pipeline [--images 512] [--pairs 5]

Photographs' size (500 x 375 JPEGs, made from the packaged drawings with grain), batches of 16,
random resized crops to 224 px and flips, float32 on the device. Ours is what `run` does: threads
decode and crop, a batch ahead is drawn while one is used. The peer is
`torch.utils.data.DataLoader` with one worker process a core and the same rule for the crops.
A pipeline that makes 5 images while the step eats 1 never lets it wait.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.pairs import Row, compare, median_seconds, table
from benchmarks.transformer import examples, our_step, vit_b16
from qkd_jax.data.crops import crop_draws
from qkd_jax.data.folder import open_folder
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.packaged import renditions
from qkd_jax.data.streams import epoch_batches, prefetch

SIZE, BATCH = 224, 16
WIDTH, HEIGHT, CLASSES = 500, 375, 8


def at(side: int) -> SimpleNamespace:
    """As much of a backbone as an image set reads."""
    return SimpleNamespace(spec=SimpleNamespace(input_size=side))


def write_photographs(root: Path, count: int) -> None:
    """`count` JPEGs to train on and one a class to test on, in class folders."""
    generator = np.random.default_rng(0)
    drawings = renditions().train
    for part, number in (("train", count), ("test", CLASSES)):
        for i in range(number):
            folder = root / part / f"class_{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = drawings.load([i % len(drawings)], at(128))["image"][0]
            image = np.asarray(Image.fromarray(pixels).resize((WIDTH, HEIGHT)), np.float32)
            grain = generator.normal(0.0, 8.0, image.shape)
            image = np.clip(image + grain, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{i}.jpg", quality=90)


def our_epoch(images: ImageSet, epoch: int) -> int:
    """Every image once, augmented, on the device; returns how many."""
    place = {"seed": 0, "task": 0, "epoch": epoch}
    batches = epoch_batches(len(images), BATCH, **place)
    loaded = prefetch(
        (images.load(indices, at(SIZE), crop_draws(indices, **place))["image"], mask)
        for indices, mask in batches
    )
    count = 0
    for pixels, mask in loaded:
        jax.block_until_ready(to_float(pixels))
        count += int(mask.sum())
    return count


@jax.jit
def to_float(pixels):
    return pixels.astype(jnp.float32) / 255.0


def torch_loader(root: Path, workers: int):
    import torch

    class Crops(torch.utils.data.Dataset):
        """RandomResizedCrop, scale (0.05, 1), ratio (3/4, 4/3), and a flip."""

        def __init__(self):
            self.files = sorted(root.glob("train/*/*.jpg"))

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            with Image.open(self.files[index]) as file:
                image = file.convert("RGB")
            width, height = image.size
            for _ in range(10):
                area = width * height * float(torch.empty(1).uniform_(0.05, 1.0))
                ratio = float(torch.exp(torch.empty(1).uniform_(np.log(3 / 4), np.log(4 / 3))))
                w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if w <= width and h <= height:
                    break
            else:
                w = h = min(width, height)
            left = int(torch.randint(0, width - w + 1, (1,)))
            top = int(torch.randint(0, height - h + 1, (1,)))
            image = image.crop((left, top, left + w, top + h))
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if torch.rand(1) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0

    return torch.utils.data.DataLoader(
        Crops(),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )


def rows(count: int, pairs: int) -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), count)
        images = open_folder(folder).train
        epochs = iter(range(1_000_000))

        def ours():
            return our_epoch(images, next(epochs))

        loader = torch_loader(Path(folder), cores)

        def theirs(loader=loader):
            return sum(len(batch) for batch in loader)

        # Theirs first: its workers are forked before ours has threads.
        if not theirs() == ours() == count:
            raise AssertionError("an epoch has another number of images")
        name = f"{count} JPEGs {WIDTH} x {HEIGHT} to {SIZE} px, augmented, batch {BATCH}"
        note = f"DataLoader, {cores} workers"
        row = compare(name, ours, theirs, f"PyTorch {note}", 1.0, pairs=pairs)
        yield row._replace(
            note=f"ours {1e3 * count / row.ours:.0f}, theirs {1e3 * count / row.peer:.0f} images/s"
        )
        del loader, theirs  # and its workers
    step = our_step(*examples(vit_b16(SIZE), BATCH))
    each = 1e3 * median_seconds(step, pairs) / BATCH
    yield Row(
        f"one image of that beside one image of the step, {SIZE} px",
        row.ours / count,
        each,
        "adapter step, ViT-B/16, ours",
        "ms",
        each * count / row.ours,
        5.0,
        "the pipeline alone on all cores, so is the step",
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    found = list(rows(options.images, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
