"""BERT, a text encoder: spec, parameters and embedding (`encode.py` runs the blocks).

Parameters are a plain pytree, with blocks as in `vit.py`:

    {"token": [V, D], "position": [P, D], "pre_norm": {"scale", "bias"}, "blocks": ...}

`position` includes the embedding of the first segment, the only one of a single text. The blocks
are post-norm, so no LayerNorm follows the last one.

Source: Devlin et al., NAACL 2019, arXiv 1810.04805. MiniLM (arXiv 2002.10957) is the same model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.errors import ConfigError, DataError
from qkd_jax.nn.inputs import Tokens
from qkd_jax.nn.layers import ACTIVATIONS, at_least_float32, layer_norm
from qkd_jax.nn.parameters import array, blocks, norm


@dataclass(frozen=True)
class BertSpec:
    """Static architecture of one text encoder.

    Attributes:
        width, depth, num_heads, mlp_width: D, L, H and the hidden width of the MLP.
        vocabulary: V, rows of the token table.
        positions: P, rows of the position table.
        num_tokens: the most tokens of a text, at most P; longer texts are cut.
        pooling: the feature of a text: the mean over its tokens, or the output of the "first", the
            class token.
        activation: "gelu" (exact) or "quick_gelu".
        eps: of every LayerNorm.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    vocabulary: int
    positions: int
    num_tokens: int
    pooling: Literal["mean", "first"] = "mean"
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    eps: float = 1e-12

    fields: ClassVar[tuple[str, ...]] = ("token_ids", "token_mask")
    post_norm: ClassVar[bool] = True
    layer_scale: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"

    def __post_init__(self):
        for name, known in (("activation", tuple(ACTIVATIONS)), ("pooling", ("mean", "first"))):
            if (found := getattr(self, name)) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, found {found!r}")
        if self.width % self.num_heads:
            raise ConfigError(
                f"width: expected a multiple of num_heads={self.num_heads}, found {self.width}"
            )
        # The class token, at least one of the text, and the separator.
        if not 3 <= self.num_tokens <= self.positions:
            raise ConfigError(
                f"num_tokens: expected 3 to {self.positions}, the positions of this encoder, found "
                f"{self.num_tokens}"
            )

    @property
    def input_size(self) -> int:
        """The most tokens of a text."""
        return self.num_tokens

    def check_form(
        self, fields: dict[str, Any], *, of_steps: bool = False
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The fields as a compiled function takes them, and their leading shape, (B,) or (S, B).

        Raises:
            DataError: not token_ids int [B, N] and token_mask bool [B, N] with N up to
                `num_tokens` (or [S, B, N] with `of_steps`).
        """
        ids, mask = (_as_array(fields[name]) for name in self.fields)
        shape = "[B, N] or [S, B, N]" if of_steps else "[B, N]"
        wanted = f"{shape} with N of 1 to {self.num_tokens}"
        if (
            not jnp.issubdtype(ids.dtype, jnp.integer)
            or ids.ndim not in ((2, 3) if of_steps else (2,))
            or not 1 <= ids.shape[-1] <= self.num_tokens
        ):
            raise DataError(
                f"token_ids: expected whole numbers {wanted}, found {ids.dtype} {list(ids.shape)}"
            )
        if mask.dtype != bool or mask.shape != ids.shape:
            raise DataError(
                f"token_mask: expected bool {list(ids.shape)}, as token_ids, found {mask.dtype} "
                f"{list(mask.shape)}"
            )
        return {"token_ids": ids.astype(jnp.int32), "token_mask": mask}, ids.shape[:-1]

    def check_values(self, fields: dict[str, Any], mask: np.ndarray) -> None:
        """Raises DataError where a real text (mask [B] or [S, B]) has unknown tokens or none."""
        ids, real = (np.asarray(fields[name])[np.asarray(mask)] for name in self.fields)
        wrong = ids[real & ((ids < 0) | (ids >= self.vocabulary))]
        if wrong.size:
            raise DataError(
                f"token_ids: expected 0 to {self.vocabulary - 1}, found {wrong[0]}; were they made "
                "by the tokenizer of this backbone?"
            )
        if not real.any(axis=-1).all():
            raise DataError(
                "token_mask: expected at least one token in each text, found a text without"
            )

    def resized(self, fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The fields as they are: a text has no other size."""
        return fields

    def embed(
        self,
        params: dict,
        fields: dict[str, jax.Array],
        preprocessing: Any,
        compute_dtype: Any,
        prompt: tuple[jax.Array, jax.Array | None] | None = None,
    ) -> Tokens:
        """Token and position embeddings, and their LayerNorm; the class token is row 0.

        A prompt's rows take the place of token embeddings. Positions count the prompt first and the
        text after it, and pass over rows that the prompt's mask leaves out. So a prompt with room
        that is not filled yet gives what the shorter prompt gives.

        Args:
            fields: {"token_ids": int [B, N], "token_mask": bool [B, N]}.
            preprocessing: not used: texts become tokens on the host (`tokens.Tokenizer`).
            prompt: ([P, D] or [B, P, D], bool [P] or [B, P]); a mask of None is all True.

        Returns:
            Tokens [B, N + P, D] in float32 (float64 when computing in float64), with the mask. The
            prompt's rows are the last P: attention knows the order by the positions alone.

        Raises:
            ConfigError: prompt and text together are longer than the encoder has positions.
        """
        wide, ids = at_least_float32(compute_dtype), fields["token_ids"]
        x = jnp.take(params["token"], ids, axis=0, mode="clip").astype(wide)
        mask = fields["token_mask"]
        if prompt is None:
            positions = params["position"][None, : ids.shape[1]]
        else:
            rows, filled = self._checked_prompt(*prompt, x)
            real = jnp.concatenate([filled, jnp.ones(ids.shape, bool)], axis=1)
            before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real.astype(jnp.int32)
            places = jnp.roll(before, ids.shape[1], axis=1)  # of the text, then of the prompt
            positions = jnp.take(params["position"], places, axis=0, mode="clip")
            x = jnp.concatenate([x, rows], axis=1)
            mask = jnp.concatenate([mask, filled], axis=1)
        x = x + positions.astype(wide)
        return Tokens(layer_norm(params["pre_norm"], x, self.eps), mask)

    def _checked_prompt(self, rows, filled, x):
        """The prompt [B, P, D] and its mask [B, P] in front of the text x [B, N, D]."""
        (batch, length, width), size = x.shape, rows.shape[-2]
        if rows.shape[-1] != width:
            raise ConfigError(f"prompt: expected rows of width {width}, found {rows.shape[-1]}")
        if length + size > self.positions:
            raise ConfigError(
                f"prompt: expected at most {self.positions - length} rows in front of {length} "
                f"tokens, since this encoder has {self.positions} positions, found {size}; shorten "
                "the prompt or the texts"
            )
        filled = jnp.ones(size, bool) if filled is None else filled
        rows = jnp.broadcast_to(rows.astype(x.dtype), (batch, size, width))
        return rows, jnp.broadcast_to(filled, (batch, size))

    def param_shapes(self) -> dict:
        """Shapes of the parameters, with a list of blocks."""
        return {
            "token": array(self.vocabulary, self.width),
            "position": array(self.positions, self.width),
            "pre_norm": norm(self.width),
            "blocks": blocks(self),
        }


def _as_array(values: Any) -> Any:
    return values if isinstance(values, jax.Array | np.ndarray) else np.asarray(values)
