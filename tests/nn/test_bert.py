"""The text encoder against transformers, and what holds for padding, pooling, adapters and checks.

Error budget against float64 goldens: float32 sums of at most 48 terms in three blocks, as in
test_vit: 1e-5 of the largest value.
"""

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
from qkd_jax.nn.encode import Inserts, encode, encode_all, encode_pooled, pooled_rows, stem
from qkd_jax.nn.inputs import Raw
from qkd_jax.weights.load import assemble
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
