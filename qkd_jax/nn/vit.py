"""Vision transformers: spec, parameters and embedding (`encode.py` runs the blocks).

Parameters are a plain pytree:

    {"patch": {"kernel": [P*P*3, D], "bias"?: [D]},      kernel rows ordered (row, column, channel)
     "class_token": [D], "position": [1+N, D], "pre_norm"?: {"scale", "bias"},
     "blocks": list of L dicts, or one dict of arrays with a leading axis L (`stack_blocks`),
         {"norm1", "query", "key", "value", "out", "norm2", "fc1", "fc2", "scale1"?, "scale2"?},
     "norm": {"scale", "bias"}}

This describes ViT and DeiT (AugReg), CLIP and DINOv2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError
from qkd_jax.nn import pixels
from qkd_jax.nn.inputs import Tokens
from qkd_jax.nn.layers import ACTIVATIONS, at_least_float32, layer_norm, linear
from qkd_jax.nn.parameters import array, blocks, dense, norm


@dataclass(frozen=True)
class ViTSpec:
    """Static architecture of one vision transformer.

    Attributes:
        width, depth, num_heads, mlp_width: D, L, H and the hidden width of the MLP.
        patch_size: P, pixels.
        image_size: side of the square images it runs at, pixels; a multiple of P.
        grid: side of the position grid in the parameters (image_size / P once loaded).
        activation: "gelu" (exact) or "quick_gelu" (CLIP).
        eps: of every LayerNorm.
        pre_norm: a LayerNorm before block 0 (CLIP).
        patch_bias: the patch projection has a bias (not in CLIP).
        layer_scale: learned factors on both branches of every block (DINOv2).
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    grid: int
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    layer_scale: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, "
                f"found {self.activation!r}"
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"width: expected a multiple of num_heads={self.num_heads}, found {self.width}"
            )
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ConfigError(
                f"image_size: expected a multiple of the patch size {self.patch_size}, found "
                f"{self.image_size}; try {near}"
            )

    fields: ClassVar[tuple[str, ...]] = ("image",)
    post_norm: ClassVar[bool] = False
    pooling: ClassVar[str] = "first"
    unit: ClassVar[str] = "px"

    @property
    def input_size(self) -> int:
        """The side of an image in pixels, for `Examples.load`."""
        return self.image_size

    @property
    def num_tokens(self) -> int:
        """The class token and the patches of one image."""
        return 1 + (self.image_size // self.patch_size) ** 2

    def check_form(
        self, fields: dict[str, Any], *, of_steps: bool = False
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The fields as a compiled function takes them, and their leading shape, (B,) or (S, B).

        Raises:
            DataError: not [B, H, W, 3] of uint8 or floats (or [S, B, H, W, 3] with `of_steps`).
        """
        image = fields["image"]
        pixels.check_shape(image, self.image_size, "image", of_steps=of_steps)
        return {"image": pixels.as_native(image)}, tuple(image.shape[:-3])

    def check_values(self, fields: dict[str, Any], mask: np.ndarray) -> None:
        """Raises DataError unless the pixels of real images (mask [B] or [S, B]) are in range."""
        pixels.check_pixels(fields["image"], "image", mask)

    def resized(self, fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The images at `image_size` (`pixels.resize`)."""
        return {"image": pixels.resize(fields["image"], self.image_size)}

    def embed(
        self,
        params: dict,
        fields: dict[str, jax.Array],
        preprocessing: Any,
        compute_dtype: Any,
        prompt: tuple[jax.Array, jax.Array | None] | None = None,
    ) -> Tokens:
        """Patches, class token, positions and CLIP's first LayerNorm; the class token is row 0.

        Args:
            fields: {"image": [B, H, W, 3]}, uint8 in 0..255 or floating point in [0, 1].
            preprocessing: a `Preprocessing`; None = pixels go in as they are, in [0, 1].
            prompt: None, since patches have no place in front of them; see `Inserts.tokens`.

        Returns:
            Tokens [B, N, D] in float32 (float64 when computing in float64).

        Raises:
            ConfigError: images or positions do not fit the spec, or there is a prompt.
        """
        if prompt is not None:
            raise ConfigError(
                "prompt: expected none, since this backbone reads images, found "
                f"{prompt[0].shape[-2]} rows; insert them as tokens instead"
            )
        images, side, patch = fields["image"], self.image_size, self.patch_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ConfigError(
                f"image: expected [B, {side}, {side}, 3], found {list(images.shape)}. "
                "Resize the images, or load the backbone with another image_size."
            )
        if params["position"].shape[0] != self.num_tokens:
            raise ConfigError(
                f"position: expected {self.num_tokens} rows for image_size {side}, found "
                f"{params['position'].shape[0]}. `load_backbone` resamples them."
            )
        wide = at_least_float32(compute_dtype)
        images = pixels.normalize(images, preprocessing or pixels.Preprocessing(), wide)
        batch, grid = images.shape[0], side // patch
        folded = images.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        folded = folded.reshape(batch, grid * grid, patch * patch * 3)
        tokens = linear(params["patch"], folded, compute_dtype).astype(wide)
        class_token = jnp.broadcast_to(
            params["class_token"].astype(wide)[None, None, :], (batch, 1, self.width)
        )
        x = jnp.concatenate([class_token, tokens], axis=1)
        x = x + params["position"].astype(wide)[None]
        if self.pre_norm:
            x = layer_norm(params["pre_norm"], x, self.eps)
        return Tokens(x)

    def param_shapes(self) -> dict:
        """Shapes of the parameters, with a list of blocks."""
        patch = dense(self.patch_size**2 * 3, self.width)
        if not self.patch_bias:
            del patch["bias"]
        shapes = {
            "patch": patch,
            "class_token": array(self.width),
            "position": array(1 + self.grid**2, self.width),
            "blocks": blocks(self),
            "norm": norm(self.width),
        }
        return shapes | ({"pre_norm": norm(self.width)} if self.pre_norm else {})
