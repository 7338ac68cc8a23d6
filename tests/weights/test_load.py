"""Loading: real values through the key maps, and one complete message for a wrong file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qkd_jax.errors import ConfigError, WeightsError
from qkd_jax.nn.encode import encode, encode_all
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.layers import layer_norm
from qkd_jax.nn.vit import ViTSpec
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
    found = jax.jit(lambda x: encode(backbone, Raw({"image": x}))[:, 0])(images)
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
    arrays[f"{block}/LayerNorm_0/bias"] = arrays[f"{block}/LayerNorm_0/bias"].astype(np.int32)
    arrays[f"{block}/LayerNorm_2/bias"] = np.full(24, np.nan, np.float32)
    query = f"{block}/MultiHeadDotProductAttention_1/query/kernel"
    arrays[query] = arrays[query].reshape(24, 24)
    with pytest.raises(WeightsError) as caught:
        assemble(arrays, "augreg_npz", SPEC, "file.npz")
    message = str(caught.value)
    assert message.startswith("file.npz: expected the 54 tensors of this architecture, found 8 ")
    for line in (
        "cls: expected (1, 1, 24), found no such tensor",
        "Transformer/encoder_norm/scale: expected (24,), found no such tensor",
        "Transformer/encoder_norm/gain: expected no such tensor, found (24,)",
        "extra: expected no such tensor, found (2, 2)",
        "embedding/kernel: expected shape (4, 4, 3, 24), found (3, 4, 4, 24)",
        f"{block}/LayerNorm_0/bias: expected float32, float64, float16 or bfloat16, found int32",
        f"{block}/LayerNorm_2/bias: expected finite values in float32, found NaN or infinity",
        f"{query}: expected shape (24, 3, 8), found (24, 24)",
    ):
        assert f"\n  {line}\n" in message


def test_each_single_key_counts():
    arrays, _, _ = augreg()
    for name in arrays:
        fewer = {k: v for k, v in arrays.items() if k != name}
        if name.startswith("head/"):
            assemble(fewer, "augreg_npz", SPEC, "x")
            continue
        with pytest.raises(WeightsError, match="found 1 problem:"):
            assemble(fewer, "augreg_npz", SPEC, "x")


def timm(spec=SPEC):
    """Tensors with timm's names, each with other values."""
    rng = np.random.default_rng(0)
    needed = {s: n for rule in KEY_MAPS["timm_safetensors"](spec) for s, n in rule.sources}
    return {s: rng.normal(size=shape).astype(np.float32) for s, shape in needed.items()}


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrower_floats_are_widened_exactly(dtype):
    stored = {name: array.astype(dtype) for name, array in timm().items()}
    found = assemble(stored, "timm_safetensors", SPEC, "x")
    widened = {name: array.astype(np.float32) for name, array in stored.items()}
    equal(found, assemble(widened, "timm_safetensors", SPEC, "x"))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    # A file may mix them, as mixed-precision training does.
    mixed = {n: stored[n] if ".attn." in n else widened[n] for n in stored}
    equal(assemble(mixed, "timm_safetensors", SPEC, "x"), found)


def test_float64_is_rounded_once_and_never_to_infinity():
    stored = {name: array.astype(np.float64) * (1 + 2**-30) for name, array in timm().items()}
    found = assemble(stored, "timm_safetensors", SPEC, "x")
    np.testing.assert_array_equal(found["norm"]["bias"], stored["norm.bias"].astype(np.float32))
    stored["norm.bias"][3] = 1e39
    with pytest.raises(WeightsError, match=r"norm\.bias: expected finite values in float32"):
        assemble(stored, "timm_safetensors", SPEC, "x")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64])
def test_other_dtypes_are_refused_in_one_line(dtype):
    stored = {name: array.astype(dtype) for name, array in timm().items()}
    with pytest.raises(WeightsError) as caught:
        assemble(stored, "timm_safetensors", SPEC, "x")
    assert f"found {np.dtype(dtype).name}\n" in str(caught.value)
    assert "cls_token, pos_embed, patch_embed.proj.weight and 39 more: " in str(caught.value)
    assert str(caught.value).endswith("\nSave the tensors as float32.")
    assert len(str(caught.value).splitlines()) == 3


PREFIXES = ["model.", "module.", "backbone.", "visual.", "module.model.", "_orig_mod.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_passed_over(prefix):
    plain = timm()
    expected = assemble(plain, "timm_safetensors", SPEC, "x")
    stored = {prefix + name: array for name, array in plain.items()}
    equal(assemble(stored, "timm_safetensors", SPEC, "x"), expected)
    # What a file may hold besides stands under the prefix, or under a part of it.
    for above in ("", prefix, prefix.split(".")[0] + "."):
        more = stored | {f"{above}head.weight": np.zeros((5, 24), np.int64)}
        equal(assemble(more, "timm_safetensors", SPEC, "x"), expected)
    with pytest.raises(WeightsError, match=r"norm\.weight: expected \(24,\), found no such"):
        assemble(
            {n: a for n, a in stored.items() if n != f"{prefix}norm.weight"},
            "timm_safetensors",
            SPEC,
            "x",
        )
    with pytest.raises(WeightsError, match=r"found 1 problem:\n  other\.weight: expected no such"):
        assemble(stored | {"other.weight": np.ones(1)}, "timm_safetensors", SPEC, "x")
    with pytest.raises(WeightsError, match=r"found 1 problem:\n  cls_token: expected no such"):
        assemble(stored | {"cls_token": plain["cls_token"]}, "timm_safetensors", SPEC, "x")


def test_the_projection_of_clip_is_passed_over():
    spec = dataclasses.replace(SPEC, pre_norm=True, patch_bias=False)
    sources = [source for rule in KEY_MAPS["clip_onnx"](spec) for source in rule.sources]
    stored = {name: np.ones(shape, np.float32) for name, shape in sources}
    projection = {"visual_projection.kernel": np.ones((24, 7), np.float32)}
    expected = assemble(stored, "clip_onnx", spec, "x")
    equal(assemble(stored | projection, "clip_onnx", spec, "x"), expected)
    assert expected.keys() == spec.param_shapes().keys()


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_a_prefix_in_an_npz_file_is_passed_over(prefix, tiny):
    arrays, _, _ = augreg()
    expected = assemble(arrays, "augreg_npz", SPEC, "x")
    np.savez(tiny / "mine.npz", **{prefix + n: a for n, a in arrays.items()})
    equal(assemble(read_npz(tiny / "mine.npz"), "augreg_npz", SPEC, "x"), expected)
    halves = {prefix + n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}
    np.savez(tiny / "mine.npz", **halves)
    bfloat16 = assemble(read_npz(tiny / "mine.npz"), "augreg_npz", SPEC, "x")
    assert bfloat16["norm"]["scale"].dtype == np.float32
    with pytest.raises(WeightsError, match="optimiser's state"):
        more = {"opt/state/param_states/cls/grad_ema": np.ones(3)}
        assemble({prefix + n: a for n, a in arrays.items()} | more, "augreg_npz", SPEC, "x")


@pytest.mark.parametrize("prefixes", [("", "ema."), ("student.", "teacher."), ("a.", "a.a.")])
def test_two_models_in_a_file_are_refused(prefixes):
    plain = timm()
    stored = {prefix + name: array for prefix in prefixes for name, array in plain.items()}
    with pytest.raises(WeightsError, match="found 2, under the prefixes") as caught:
        assemble(stored, "timm_safetensors", SPEC, "x")
    assert all(repr(prefix) in str(caught.value) for prefix in prefixes)


def test_a_prefix_of_only_some_needed_names_is_no_prefix():
    stored = {("enc." if "blocks" in name else "") + name: a for name, a in timm().items()}
    with pytest.raises(WeightsError, match=r"cls_token: expected no such tensor"):
        assemble(stored, "timm_safetensors", SPEC, "x")
    # A name that only ends like a needed one has no prefix.
    stored = {name.replace("norm.", "fc_norm."): a for name, a in timm().items()}
    with pytest.raises(WeightsError, match="averages its tokens"):
        assemble(stored, "timm_safetensors", SPEC, "x")


FOREIGN = {
    "vit.embeddings.cls_token vit.encoder.layer.0.attention.attention.query.weight": "Hugging Face",
    "vision_model.embeddings.class_embedding vision_model.post_layernorm.bias": "a CLIP of transf",
    "visual.class_embedding visual.transformer.resblocks.0.ln_1.bias": "CLIP of OpenAI",
    "base_model.model.blocks.0.attn.qkv.lora_A.weight": "a LoRA",
    "optimizer.state.0.exp_avg model.blocks.0.norm1.weight": "an optimiser's state",
    "params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias": "big_vision",
    "some.thing.else": "Check that the file belongs",
}


@pytest.mark.parametrize("names, told", FOREIGN.items())
def test_another_file_is_named_in_a_short_message(names, told):
    stored = {name: np.ones(3, np.float32) for name in names.split()}
    stored |= {f"{names.split()[0]}.{i}": np.ones(2, np.float32) for i in range(150)}
    with pytest.raises(WeightsError) as caught:
        assemble(stored, "timm_safetensors", SPEC, "x")
    message = str(caught.value)
    assert told in message and len(message.splitlines()) == 13
    assert f"found {42 + len(stored)} problems" in message
    assert "expected (1, 1, 24), found no such tensor" in message and "no such tensor," in message


def test_names_of_the_other_format_are_told():
    with pytest.raises(WeightsError, match=r"names of a \.safetensors file"):
        assemble(timm(), "augreg_npz", SPEC, "x")
    with pytest.raises(WeightsError, match=r"names of a \.npz file"):
        assemble(augreg()[0], "timm_safetensors", SPEC, "x")
    clip = dataclasses.replace(SPEC, pre_norm=True)
    with pytest.raises(WeightsError, match=r"holds pre_norm/bias, pre_norm/scale, found augreg"):
        assemble(augreg()[0], "augreg_npz", clip, "x")


def empty(spec, kind="timm_safetensors", prefix=""):
    """Tensors of the shapes of `spec` that take no memory."""
    zero = np.float32(0)
    needed = {s: n for rule in KEY_MAPS[kind](spec) for s, n in rule.sources}
    return {prefix + name: np.broadcast_to(zero, shape) for name, shape in needed.items()}


def test_the_shapes_tell_which_name_fits():
    small = registry.lookup("dinov2_vit_s14").spec
    big = registry.lookup("vit_b16_in21k_augreg").spec
    with pytest.raises(WeightsError) as caught:
        assemble(empty(small, prefix="model."), "timm_safetensors", big, "x")
    message = str(caught.value)
    assert "patch_size 14" in message and "found width 384" not in message.splitlines()[0]
    assert "Expected width 768, mlp_width 3072, patch_size 16, grid 14; found width 384" in message
    assert "fits the name dinov2_vit_s14" in message and len(message.splitlines()) == 13
    for kind in ("augreg_npz", "timm_safetensors"):
        with pytest.raises(WeightsError, match="fits the name vit_b16_in21k_augreg or"):
            assemble(empty(big, kind), kind, SPEC, "x")
    large = dataclasses.replace(big, grid=24)
    with pytest.raises(WeightsError, match=r"Expected grid 14; found grid 24\. No registered"):
        assemble(empty(large), "timm_safetensors", big, "x")
    deep = dataclasses.replace(big, depth=24)
    with pytest.raises(WeightsError, match=r"Expected depth 12; found depth 24\. No registered"):
        assemble(empty(deep), "timm_safetensors", big, "x")


@pytest.mark.parametrize("kind", sorted(KEY_MAPS))
def test_key_maps_fill_every_leaf_once_and_use_each_source(kind):
    specs = {e.format: e.spec for e in registry.ENTRIES}
    spec = specs[kind]
    rules = list(KEY_MAPS[kind](spec))
    paths, _ = jax.tree_util.tree_flatten_with_path(spec.param_shapes())
    leaves = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)
    assert sorted(rule.target for rule in rules) == leaves
    # Every transform gives its leaf's shape; the tensors here take no memory.
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape for p, leaf in paths}
    for rule in rules:
        parts = (np.broadcast_to(np.float32(0), shape) for _, shape in rule.sources)
        assert rule.transform(*parts).shape == shapes[rule.target]


def test_damaged_and_foreign_files_name_the_file(tiny):
    with pytest.raises(WeightsError, match=r"weights: expected .* found nothing at .*absent\.npz"):
        load_backbone("tiny", path=tiny / "absent.npz")
    (tiny / "tiny.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(WeightsError, match="truncated") as caught:
        load_backbone("tiny", path=tiny)
    assert "fetch it again" not in str(caught.value)  # nobody can fetch the user's own file
    with pytest.raises(WeightsError, match=r"truncated.*Delete it and fetch it again"):
        load_backbone("tiny", cache_dir=tiny)
    save_file({"a": np.zeros(2, np.float32)}, tiny / "tiny.safetensors")
    with pytest.raises(WeightsError, match="cls_token: expected"):
        load_backbone("tiny", path=tiny / "tiny.safetensors")


@pytest.mark.parametrize("ending", [".bin", ".pth", ".pt", ".ckpt", ".h5", ".PTH"])
def test_files_that_run_code_are_refused_with_a_way_out(tiny, ending):
    file = tiny / f"pytorch_model{ending}"
    file.write_bytes(b"")
    for given in (file, tiny):
        with pytest.raises(
            WeightsError, match=rf"found {ending}.*can run code.*safetensors\.torch"
        ):
            load_backbone("tiny", path=given)


@pytest.mark.parametrize("name", ["weights", "weights.json", "weights.onnx", "weights.msgpack"])
def test_other_endings_are_refused(tiny, name):
    (tiny / name).write_bytes(b"")
    with pytest.raises(WeightsError, match="expected the ending"):
        load_backbone("tiny", path=tiny / name)


HUB = ("config.json", "README.md", "pytorch_model.bin", ".hidden.safetensors")


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["tiny.npz", "model.safetensors", "z.npz"], "tiny.npz"),
        (["model.safetensors", "open_clip_model.safetensors"], "model.safetensors"),
        (["anything.safetensors"], "anything.safetensors"),
        (["UPPER.NPZ"], "UPPER.NPZ"),
        (["Upper.SafeTensors"], "Upper.SafeTensors"),
    ],
)
def test_a_folder_gives_its_one_weight_file(tiny, names, chosen):
    arrays, _, _ = augreg()
    for name in HUB:
        (tiny / name).write_bytes(b"")
    (tiny / "folder.npz").mkdir()
    for name in names:
        marked = name == chosen
        if name.lower().endswith(".npz"):
            np.savez(tiny / "writing", **{n: a + marked for n, a in arrays.items()})
            (tiny / "writing.npz").rename(tiny / name)
            expected = arrays["cls"][0, 0] + 1
        else:
            save_file({n: a + marked for n, a in timm().items()}, tiny / name)
            expected = timm()["cls_token"][0, 0] + 1
        if marked:
            token = expected
    backbone = load_backbone("tiny", path=tiny)
    np.testing.assert_array_equal(backbone.params["class_token"], token)


def test_a_hubs_cache_gives_its_only_revision(tiny):
    """`models--<owner>--<name>/snapshots/<revision>/model.safetensors`, a link into `blobs/`."""
    for folder in ("blobs", "refs", "snapshots/0a1b"):
        (tiny / folder).mkdir(parents=True)
    save_file(timm(), tiny / "blobs/f00d")
    (tiny / "snapshots/0a1b/model.safetensors").symlink_to(tiny / "blobs/f00d")
    found = load_backbone("tiny", path=tiny).params["class_token"]
    np.testing.assert_array_equal(found, timm()["cls_token"][0, 0])
    (tiny / "snapshots/2c3d").mkdir()
    with pytest.raises(WeightsError, match=r"expected one revision .* found 2: 0a1b, 2c3d"):
        load_backbone("tiny", path=tiny)


def test_a_folder_with_several_or_no_weight_files_is_refused(tiny):
    (tiny / "config.json").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"expected tiny\.npz, model\.safe.*, found none"):
        load_backbone("tiny", path=tiny)
    (tiny / "a.safetensors").write_bytes(b"")
    (tiny / "b.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"found 2: a\.safetensors, b\.onnx\. Give the file"):
        load_backbone("tiny", path=tiny)


def test_a_sharded_folder_is_read_whole(tiny):
    plain = timm()
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    homes = {name: names[i % 3] for i, name in enumerate(plain)}
    for shard in names:
        save_file({n: plain[n] for n in plain if homes[n] == shard}, tiny / shard)
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    for given in (tiny, index):
        backbone = load_backbone("tiny", path=given)
        equal(backbone.params, assemble(plain, "timm_safetensors", SPEC, "x"))
    with pytest.raises(WeightsError, match="one of several shards"):
        load_backbone("tiny", path=tiny / names[0])
    (tiny / names[1]).unlink()
    with pytest.raises(WeightsError, match=r"found no model-00002-of-00003\.safe"):
        load_backbone("tiny", path=tiny)


def test_environment_variable_names_the_file(tiny, monkeypatch):
    arrays, _, _ = augreg()
    np.savez(tiny / "mine.npz", **arrays)
    monkeypatch.setenv("QKD_JAX_WEIGHTS", str(tiny / "mine.npz"))
    backbone = load_backbone("tiny")
    np.testing.assert_array_equal(backbone.params["class_token"], arrays["cls"][0, 0])
    monkeypatch.setenv("QKD_JAX_WEIGHTS", str(tiny / "moved.npz"))
    with pytest.raises(WeightsError, match=r"^QKD_JAX_WEIGHTS: expected .*moved\.npz.* unset"):
        load_backbone("tiny")


def test_home_folders_in_paths(tiny, monkeypatch):
    arrays, _, _ = augreg()
    np.savez(tiny / "mine.npz", **arrays)
    monkeypatch.setenv("HOME", str(tiny))
    load_backbone("tiny", path="~/mine.npz")
    with pytest.raises(WeightsError, match="unknown user"):
        load_backbone("tiny", path="~no_such_user/mine.npz")


@pytest.mark.parametrize("odd", ["mine.npz/inner", "nul\0byte.npz", "x" * 300, "/dev/null"])
def test_odd_paths_give_one_error(tiny, odd):
    (tiny / "mine.npz").write_bytes(b"")
    with pytest.raises(WeightsError, match="weights: expected a weight file"):
        load_backbone("tiny", path=tiny / odd)


def test_a_forbidden_folder_says_permission(tiny, monkeypatch):
    def forbidden(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(WeightsError, match="Permission denied"):
        load_backbone("tiny", path=tiny / "x.npz")


def test_image_size_resamples_positions_once(tiny):
    arrays, _, _ = augreg()
    np.savez(tiny / "tiny.npz", **arrays)
    backbone = load_backbone("tiny", path=tiny, image_size=20)
    assert backbone.spec.grid == 5 and backbone.params["position"].shape == (26, 24)
    assert encode(backbone, Raw({"image": jnp.zeros((1, 20, 20, 3))})).shape == (1, 1, 24)
    with pytest.raises(ConfigError, match="multiple of the patch"):
        load_backbone("tiny", path=tiny, image_size=21)
    with pytest.raises(ConfigError, match="expected plain, found 'imagenet'"):
        load_backbone("tiny", path=tiny, preprocessing="imagenet")


def test_the_first_blocks_alone_end_in_the_last_norm(tiny):
    """The last block computes one row in place of all: sums of 48 terms of values up to 3 differ in
    their order by some 1e-6; budget 1e-5.
    """
    arrays, images, _ = augreg()
    np.savez(tiny / "tiny.npz", **arrays)
    whole, cut = load_backbone("tiny", path=tiny), load_backbone("tiny", path=tiny, blocks=2)
    assert cut.spec.depth == 2 and whole.spec.depth == 3
    inputs = Raw({"image": jnp.asarray(images)})
    after = encode_all(whole, inputs)[2][:, 0]
    expected = layer_norm(whole.params["norm"], after, whole.spec.eps)
    np.testing.assert_allclose(encode(cut, inputs)[:, 0], expected, rtol=0, atol=1e-5)
    for count in (0, 4):
        with pytest.raises(ConfigError, match=f"blocks: expected 1 to 3, .* found {count}"):
            load_backbone("tiny", blocks=count)  # before any file is looked for


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(WeightsError, match="Did you mean 'clip_vit_b16'"):
        load_backbone("clip_vit_b_16")


def test_registry_is_consistent():
    assert len(set(registry.names())) == len(registry.ENTRIES)
    for entry in registry.ENTRIES:
        assert entry.format in KEY_MAPS and entry.format in load_module.READERS
        assert entry.licence and bool(entry.preprocessings) != bool(entry.tokenizer)
    assert list(registry.lookup("vit_b16_in21k_augreg").preprocessings) == ["l2p01", "augreg"]


@pytest.mark.parametrize(
    "name, eps, activation, mean, deviation",
    [
        (
            *("clip_vit_b16", 1e-5, "quick_gelu"),
            *((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ),
        ("dinov2_vit_s14", 1e-6, "gelu", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("vit_b16_in21k_augreg", 1e-6, "gelu", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_constants_of_the_published_models(name, eps, activation, mean, deviation):
    """As in the code of CLIP, DINOv2 and timm; pixels in [0, 1] are the toolboxes' choice."""
    entry = registry.lookup(name)
    assert (entry.spec.eps, entry.spec.activation) == (eps, activation)
    default = next(iter(entry.preprocessings.values()))
    assert (default.mean, default.std) == (mean, deviation)
