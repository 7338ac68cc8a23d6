"""Loading: real values through the key maps, and one complete message for a wrong file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qkd_jax.errors import ConfigError, WeightsError
from qkd_jax.nn.encode import encode
from qkd_jax.nn.vit import ViTSpec, param_shapes
from qkd_jax.weights import load as load_module
from qkd_jax.weights import registry
from qkd_jax.weights.key_maps import KEY_MAPS
from qkd_jax.weights.load import assemble, load_backbone
from qkd_jax.weights.readers import read_npz

GOLDEN = Path(__file__).parent.parent / "golden"
SPEC = ViTSpec(width=24, depth=3, num_heads=3, mlp_width=48, patch_size=4, image_size=12, grid=3)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A registered tiny transformer whose file is written by each test."""
    entry = registry.Entry(
        name="tiny",
        source=registry.UrlSource("http://unreachable.invalid/tiny.npz"),
        file="tiny.npz",
        format="augreg_npz",
        sha256=None,
        licence="none",
        spec=SPEC,
        preprocessings={"plain": registry.Preprocessing()},
    )
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, entry))
    monkeypatch.delenv("QKD_JAX_WEIGHTS", raising=False)
    return tmp_path


def augreg():
    """(arrays of the golden npz under vision_transformer's names, images, feature)."""
    arrays = read_npz(GOLDEN / "vit_augreg.npz")
    golden = {k: arrays.pop(k) for k in list(arrays) if k.startswith("golden/")}
    return arrays, golden["golden/images"], golden["golden/feature"]


def test_augreg_npz_gives_the_feature_that_timm_computes_from_it(tiny):
    arrays, images, feature = augreg()
    np.savez(tiny / "tiny.npz", **arrays)
    backbone = load_backbone("tiny", path=tiny)
    found = jax.jit(lambda x: encode(backbone.params, backbone.spec, x))(images)
    # As in test_vit: float32 sums of at most 48 terms in three blocks.
    np.testing.assert_allclose(found, feature, atol=1e-5 * np.abs(feature).max())
    assert backbone.name == "tiny" and backbone.spec == SPEC
    stacked = load_backbone("tiny", path=tiny / "tiny.npz", stacked=True, dtype=jnp.bfloat16)
    assert stacked.params["blocks"]["query"]["kernel"].shape == (3, 24, 24)
    assert stacked.params["norm"]["scale"].dtype == jnp.bfloat16


def test_layouts_that_hold_the_same_values_are_accepted():
    arrays, _, _ = augreg()
    expected = assemble(arrays, "augreg_npz", SPEC, "x")
    other = {k: np.asfortranarray(v).astype(">f4") for k, v in arrays.items()}
    found = assemble(other, "augreg_npz", SPEC, "x")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(
        leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in jax.tree.leaves(found)
    )


def test_every_problem_is_listed_at_once():
    arrays, _, _ = augreg()
    block = "Transformer/encoderblock_1"
    del arrays["cls"]
    arrays["Transformer/encoder_norm/gain"] = arrays.pop("Transformer/encoder_norm/scale")
    arrays["extra"] = np.zeros((2, 2), np.float32)
    arrays["embedding/kernel"] = arrays["embedding/kernel"].transpose(2, 0, 1, 3)
    arrays[f"{block}/LayerNorm_0/bias"] = arrays[f"{block}/LayerNorm_0/bias"].astype(np.float16)
    arrays[f"{block}/LayerNorm_2/bias"] = np.full(24, np.nan, np.float32)
    query = f"{block}/MultiHeadDotProductAttention_1/query/kernel"
    arrays[query] = arrays[query].reshape(24, 24)
    with pytest.raises(WeightsError) as caught:
        assemble(arrays, "augreg_npz", SPEC, "file.npz")
    message = str(caught.value)
    assert "file.npz" in message and "8 problems" in message
    for line in (
        "missing: cls (1, 1, 24)",
        "missing: Transformer/encoder_norm/scale (24,)",
        "unexpected: Transformer/encoder_norm/gain (24,)",
        "unexpected: extra (2, 2)",
        "wrong shape: embedding/kernel is (3, 4, 4, 24), expected (4, 4, 3, 24)",
        f"wrong dtype: {block}/LayerNorm_0/bias is float16, expected float32",
        f"not finite: {block}/LayerNorm_2/bias",
        f"wrong shape: {query} is (24, 24), expected (24, 3, 8)",
    ):
        assert line in message


def test_each_single_key_counts():
    arrays, _, _ = augreg()
    for name in arrays:
        fewer = {k: v for k, v in arrays.items() if k != name}
        if name.startswith("head/"):
            assemble(fewer, "augreg_npz", SPEC, "x")
            continue
        with pytest.raises(WeightsError, match="1 problems"):
            assemble(fewer, "augreg_npz", SPEC, "x")


@pytest.mark.parametrize("kind", sorted(KEY_MAPS))
def test_key_maps_fill_every_leaf_once_and_use_each_source(kind):
    specs = {e.format: e.spec for e in registry.ENTRIES}
    spec = specs[kind]
    rules = list(KEY_MAPS[kind](spec))
    paths, _ = jax.tree_util.tree_flatten_with_path(param_shapes(spec))
    leaves = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)
    assert sorted(rule.target for rule in rules) == leaves


def test_damaged_and_foreign_files_name_the_file(tiny):
    with pytest.raises(WeightsError, match="no weight file"):
        load_backbone("tiny", path=tiny / "absent.npz")
    (tiny / "tiny.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(WeightsError, match="truncated"):
        load_backbone("tiny", path=tiny)
    (tiny / "tiny.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"ending '\.pth'"):
        load_backbone("tiny", path=tiny / "tiny.pth")
    save_file({"a": np.zeros(2, np.float32)}, tiny / "tiny.safetensors")
    with pytest.raises(WeightsError, match="missing: cls_token"):
        load_backbone("tiny", path=tiny / "tiny.safetensors")


def test_environment_variable_names_the_file(tiny, monkeypatch):
    arrays, _, _ = augreg()
    np.savez(tiny / "mine.npz", **arrays)
    monkeypatch.setenv("QKD_JAX_WEIGHTS", str(tiny / "mine.npz"))
    backbone = load_backbone("tiny")
    np.testing.assert_array_equal(backbone.params["class_token"], arrays["cls"][0, 0])


def test_image_size_resamples_positions_once(tiny):
    arrays, _, _ = augreg()
    np.savez(tiny / "tiny.npz", **arrays)
    backbone = load_backbone("tiny", path=tiny, image_size=20)
    assert backbone.spec.grid == 5 and backbone.params["position"].shape == (26, 24)
    assert encode(backbone.params, backbone.spec, jnp.zeros((1, 20, 20, 3))).shape == (1, 24)
    with pytest.raises(ConfigError, match="multiple of the patch"):
        load_backbone("tiny", path=tiny, image_size=21)
    with pytest.raises(ConfigError, match="no preprocessing 'imagenet'"):
        load_backbone("tiny", path=tiny, preprocessing="imagenet")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(WeightsError, match="Did you mean 'clip_vit_b16'"):
        load_backbone("clip_vit_b_16")


def test_registry_is_consistent():
    assert len(set(registry.names())) == len(registry.ENTRIES)
    for entry in registry.ENTRIES:
        assert entry.format in KEY_MAPS and entry.format in load_module.READERS
        assert entry.licence and entry.preprocessings
    assert list(registry.lookup("vit_b16_in21k_augreg").preprocessings) == ["l2p01", "augreg"]
