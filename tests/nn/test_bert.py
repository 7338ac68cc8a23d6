"""The text encoder against transformers, and what holds for padding, pooling, adapters and checks.

Error budget against float64 goldens: float32 sums of at most 48 terms in three blocks, as in
test_vit: 1e-5 of the largest value.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qkd_jax.errors import ConfigError, DataError
from qkd_jax.nn.adapters import AdapterSpec, init_adapter
from qkd_jax.nn.backbone import Backbone, stack_blocks
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.encode import (
    Inserts,
    embed,
    encode,
    encode_all,
    encode_pooled,
    pooled_rows,
    stem,
)
from qkd_jax.nn.inputs import Raw
from qkd_jax.weights.load import assemble, tiny_random
from qkd_jax.weights.readers import read_bert

GOLDEN = Path(__file__).parent.parent / "golden" / "bert_tiny.safetensors"
SPEC = BertSpec(24, 3, 3, 48, vocabulary=50, positions=12, num_tokens=10)


@pytest.fixture(scope="module")
def tiny():
    """(backbone, fields, hidden states [4] of [B, N, D])."""
    arrays = read_bert(GOLDEN)
    golden = {name: arrays.pop(name) for name in list(arrays) if name.startswith("golden.")}
    params = assemble(arrays, "bert_safetensors", SPEC, "tiny")
    fields = {name: golden[f"golden.{name}"] for name in SPEC.fields}
    hidden = [golden[f"golden.hidden.{index}"] for index in range(4)]
    return Backbone(jax.tree.map(jnp.asarray, params), SPEC), fields, hidden


@pytest.mark.floor
def test_every_block_gives_what_transformers_gives(tiny):
    backbone, fields, hidden = tiny
    found = encode_all(backbone, Raw(fields))
    real = fields["token_mask"]
    # encode_all repeats the last block's output, after which there is no LayerNorm.
    for ours, theirs in zip([*found[:-1]], hidden, strict=True):
        np.testing.assert_allclose(ours[real], theirs[real], atol=1e-5 * np.abs(theirs).max())
    np.testing.assert_array_equal(found[-1], found[-2])


def test_stacked_blocks_give_the_same(tiny):
    backbone, fields, _ = tiny
    stacked = backbone.replace(params=stack_blocks(backbone.params))
    np.testing.assert_allclose(
        encode_pooled(stacked, Raw(fields)), encode_pooled(backbone, Raw(fields)), atol=2e-6
    )


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_feature_is_pooled_over_real_tokens(tiny, pooling):
    backbone, fields, hidden = tiny
    backbone = backbone.replace(spec=BertSpec(24, 3, 3, 48, 50, 12, 10, pooling))
    found = np.asarray(encode_pooled(backbone, Raw(fields)))
    for row, (states, real) in enumerate(zip(hidden[-1], fields["token_mask"], strict=True)):
        expected = states[real].mean(axis=0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-5 * np.abs(hidden[-1]).max())


def test_a_feature_depends_neither_on_padding_nor_on_its_neighbours(tiny):
    """The same text alone, cut to its length, and beside longer ones, whatever is in padding."""
    backbone, fields, _ = tiny
    together = np.asarray(encode_pooled(backbone, Raw(fields)))
    other = np.where(fields["token_mask"], fields["token_ids"], 49)
    noisy = encode_pooled(backbone, Raw({**fields, "token_ids": other}))
    np.testing.assert_array_equal(noisy, together)
    for row, length in enumerate(fields["token_mask"].sum(axis=1)):
        alone = {name: array[row : row + 1, :length] for name, array in fields.items()}
        np.testing.assert_allclose(encode_pooled(backbone, Raw(alone))[0], together[row], atol=5e-6)


@pytest.mark.parametrize("first_block", [0, 2])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_adapters_start_from_the_kept_stem(tiny, first_block, pooling):
    """The stem of all rows, or of the class token alone, as the pooling reads."""
    backbone, fields, _ = tiny
    backbone = backbone.replace(spec=BertSpec(24, 3, 3, 48, 50, 12, 10, pooling))
    settings = AdapterSpec(3, 0.7, first_block=first_block)
    adapter = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(a.size), a.shape),
        init_adapter(jax.random.key(2), settings, 24, 3),
    )
    inserts = Inserts(adapter, settings)
    kept = stem(backbone, Raw(fields), first_block, rows=pooled_rows(backbone.spec))
    found = encode_pooled(backbone, kept, inserts)
    expected = encode_pooled(backbone, Raw(fields), inserts)
    assert np.abs(expected - encode_pooled(backbone, Raw(fields))).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_inserted_tokens_are_read_but_not_pooled(tiny):
    backbone, fields, _ = tiny
    inserts = Inserts(tokens=jax.random.normal(jax.random.key(0), (2, 24)))
    found = encode_pooled(backbone, Raw(fields), inserts)
    rows = np.asarray(encode(backbone, Raw(fields), inserts, rows=range(12)))
    weights = fields["token_mask"][:, :, None]
    expected = (rows[:, :10] * weights).sum(axis=1) / weights.sum(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - encode_pooled(backbone, Raw(fields))).max() > 1e-2


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + SPEC.eps) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def prompted(params, ids, prompt):
    """Hidden states [P + n, D] of one text of n tokens behind a prompt [P, D], in plain NumPy."""
    erf = np.vectorize(math.erf)
    x = np.vstack([prompt, params["token"][ids]])
    x = norm(params["pre_norm"], x + params["position"][: len(x)])
    for p in params["blocks"]:
        q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
        mixed = []
        for h in (slice(8 * head, 8 * head + 8) for head in range(SPEC.num_heads)):
            weights = np.exp(q[:, h] @ k[:, h].T / math.sqrt(8))
            mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, h])
        x = norm(p["norm1"], x + dense(p["out"], np.hstack(mixed)))
        hidden = dense(p["fc1"], x)
        hidden = 0.5 * hidden * (1.0 + erf(hidden / math.sqrt(2.0)))
        x = norm(p["norm2"], x + dense(p["fc2"], hidden))
    return x


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each text"])
def test_a_prompt_stands_in_front_of_the_text(tiny, own, pooling):
    """Against NumPy, both in float64: 1e-12 of values near 1. Rows 1 and 4 of the prompt are not
    there: neither seen nor counted among the positions.
    """
    backbone, fields, _ = tiny
    spec = BertSpec(24, 3, 3, 48, 50, positions=16, num_tokens=10, pooling=pooling)
    random, batch = np.random.default_rng(0), len(fields["token_ids"])
    positions = random.standard_normal((16, 24))
    params = {**jax.tree.map(np.float64, backbone.params), "position": positions}
    prompt = random.standard_normal((batch, 5, 24) if own else (5, 24))
    mask = np.array([1, 0, 1, 1, 0], bool)
    masks = np.stack([np.roll(mask, n) for n in range(batch)]) if own else mask
    inserts = Inserts(prompt=prompt, prompt_mask=masks)
    with jax.enable_x64(True):
        options = {"compute_dtype": jnp.float64}
        ours, stacked = Backbone(params, spec), Backbone(stack_blocks(params), spec)
        found = encode_pooled(ours, Raw(fields), inserts, **options)
        scanned = encode_pooled(stacked, Raw(fields), inserts, **options)
        rows = encode(ours, Raw(fields), inserts, rows=None, **options)
        first = encode(ours, Raw(fields), inserts, **options)
        every = encode_all(ours, Raw(fields), inserts, **options)[-1]
    for number, (ids, real) in enumerate(
        zip(fields["token_ids"], fields["token_mask"], strict=True)
    ):
        kept = masks[number] if own else mask
        hidden = prompted(params, ids[real], (prompt[number] if own else prompt)[kept])
        expected = hidden[3:].mean(0) if pooling == "mean" else hidden[3]
        np.testing.assert_allclose(found[number], expected, atol=1e-12)
        np.testing.assert_allclose(scanned[number], expected, atol=1e-12)
        np.testing.assert_allclose(rows[number][real], hidden[3:], atol=1e-12)
        np.testing.assert_allclose(first[number, 0], hidden[3], atol=1e-12)
        np.testing.assert_allclose(every[number, 10:][kept], hidden[:3], atol=1e-12)


def test_a_prompt_with_free_room_is_the_shorter_prompt(tiny):
    """Up to the order of sums; whatever is in the room."""
    backbone, fields, _ = tiny
    fields = {name: array[:, :8] for name, array in fields.items()}
    rows = jax.random.normal(jax.random.key(0), (4, 24))
    short = encode_pooled(backbone, Raw(fields), Inserts(prompt=rows[:2]))
    for room in (rows, rows.at[2:].set(1e3)):
        inserts = Inserts(prompt=room, prompt_mask=jnp.arange(4) < 2)
        np.testing.assert_allclose(encode_pooled(backbone, Raw(fields), inserts), short, atol=5e-6)
    none = Inserts(prompt=rows, prompt_mask=jnp.zeros(4, bool))
    plain = encode_pooled(backbone, Raw(fields))
    np.testing.assert_allclose(encode_pooled(backbone, Raw(fields), none), plain, atol=5e-6)
    assert np.abs(short - plain).max() > 1e-2
    # Inserted tokens are still the last rows.
    both = Inserts(tokens=rows[2:], prompt=rows[:2])
    found = encode(backbone, Raw(fields), both, rows=range(-2, 0))
    every = encode_all(backbone, Raw(fields), both)[-1]
    assert every.shape[1] == 12 and encode(backbone, Raw(fields), both, rows=None).shape[1] == 8
    np.testing.assert_allclose(found, every[:, -2:], atol=5e-6)


def test_prompts_that_do_not_fit_are_named(tiny):
    backbone, fields, _ = tiny
    rows = Inserts(prompt=jnp.zeros((3, 24)))
    with pytest.raises(ConfigError, match=r"at most 2 rows in front of 10 tokens, .* found 3"):
        encode_pooled(backbone, Raw(fields), rows)
    with pytest.raises(ConfigError, match="rows of width 24, found 23"):
        encode_pooled(backbone, Raw(fields), Inserts(prompt=jnp.zeros((2, 23))))
    with pytest.raises(ConfigError, match=r"not embedded yet, .* before block 0"):
        encode_pooled(backbone, embed(backbone, Raw(fields)), rows)
    with pytest.raises(ConfigError, match="adapters only"):
        encode_pooled(backbone, stem(backbone, Raw(fields), 1, rows=None), rows)
    images = tiny_random(16)
    with pytest.raises(ConfigError, match=r"prompt: expected none, .* reads images, found 3 rows"):
        encode(images, Raw({"image": jnp.zeros((1, 16, 16, 3))}), rows)


def test_a_padded_input_without_tokens_is_finite(tiny):
    backbone, fields, _ = tiny
    nothing = {**fields, "token_mask": np.zeros_like(fields["token_mask"])}
    assert np.isfinite(encode_pooled(backbone, Raw(nothing))).all()


@pytest.mark.parametrize(
    "ids, mask, words",
    [
        (np.zeros((2, 11), int), np.ones((2, 11), bool), ["token_ids", "1 to 10", "[2, 11]"]),
        (np.zeros(4, int), np.ones(4, bool), ["token_ids", "[B, N]", "[4]"]),
        (np.zeros((2, 4)), np.ones((2, 4), bool), ["token_ids", "whole numbers", "float64"]),
        (np.zeros((2, 4), int), np.ones((2, 4), int), ["token_mask", "bool", "int64"]),
        (np.zeros((2, 4), int), np.ones((2, 3), bool), ["token_mask", "[2, 4]", "[2, 3]"]),
        (np.full((2, 4), 50), np.ones((2, 4), bool), ["token_ids", "0 to 49", "50"]),
        (np.full((2, 4), -1), np.ones((2, 4), bool), ["token_ids", "found -1"]),
        (np.zeros((2, 4), int), np.zeros((2, 4), bool), ["token_mask", "at least one token"]),
    ],
)
def test_fields_that_do_not_fit_are_refused(ids, mask, words):
    fields = {"token_ids": ids, "token_mask": mask}
    with pytest.raises(DataError) as caught:
        checked, rows = SPEC.check_form(fields)
        SPEC.check_values(checked, np.ones(rows, bool))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_padded_rows_may_hold_anything():
    ids = np.array([[1, 2], [99, 99]])
    fields, rows = SPEC.check_form({"token_ids": ids, "token_mask": np.array([[1, 1], [0, 0]]) > 0})
    assert rows == (2,) and fields["token_ids"].dtype == np.int32
    SPEC.check_values(fields, np.array([True, False]))


def test_specs_that_do_not_fit_are_refused():
    for changes, words in (
        ({"num_tokens": 13}, "num_tokens: expected 3 to 12"),
        ({"num_heads": 5}, "width: expected a multiple of num_heads=5"),
        ({"pooling": "max"}, "pooling: expected one of mean, first, found 'max'"),
    ):
        with pytest.raises(ConfigError, match=words):
            BertSpec(
                **(
                    {"width": 24, "depth": 3, "num_heads": 3, "mlp_width": 48}
                    | {"vocabulary": 50, "positions": 12, "num_tokens": 10}
                    | changes
                )
            )


def test_the_golden_file_has_the_older_names():
    names = load_file(GOLDEN)
    assert "bert.embeddings.LayerNorm.gamma" in names and "bert.pooler.dense.weight" in names
