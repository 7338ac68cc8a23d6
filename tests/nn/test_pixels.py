"""Images brought to another size on the device, against Pillow."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qkd_jax.errors import ConfigError
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.pixels import resize
from qkd_jax.weights.load import tiny_random


@pytest.mark.parametrize("size", [16, 21, 32])
def test_resized_images_are_pillows(size):
    """Pillow rounds to whole numbers after each of its two passes: together less than 1 of 255.
    The contrast is low, so that neither pass leaves the range, where it would be cut off.
    """
    images = np.random.default_rng(0).integers(100, 140, (2, 24, 24, 3), dtype=np.uint8)
    resample = Image.Resampling.BICUBIC
    expected = [np.asarray(Image.fromarray(one).resize((size, size), resample)) for one in images]
    found = np.asarray(resize(jnp.asarray(images), size))
    assert found.shape == (2, size, size, 3)
    assert np.abs(255 * found - np.stack(expected)).max() < 1.0
    floats = resize(jnp.asarray(images.astype(np.float32) / 255), size)
    np.testing.assert_allclose(floats, found, rtol=0, atol=1e-6)


def test_pixels_stay_in_range_and_images_of_the_right_size_as_they_are():
    images = 255 * np.random.default_rng(0).integers(0, 2, (1, 24, 24, 3), dtype=np.uint8)
    found = resize(jnp.asarray(images), 30)
    assert 0.0 == found.min() and found.max() == 1.0
    assert resize(images, 24) is images


def test_a_backbone_resizes_only_inputs_that_say_so():
    backbone = tiny_random(32)
    images = jnp.asarray(np.random.default_rng(0).random((2, 40, 40, 3), np.float32))
    found = encode(backbone, Raw({"image": images}, resize=True))
    assert (found == encode(backbone, Raw({"image": resize(images, 32)}))).all()
    with pytest.raises(ConfigError, match=r"expected \[B, 32, 32, 3\]"):
        encode(backbone, Raw({"image": images}))
