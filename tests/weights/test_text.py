"""Text encoders: their weights, their tokenizer, and one clear message where these do not fit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qkd_jax
from qkd_jax.errors import ConfigError, WeightsError
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.encode import encode
from qkd_jax.nn.inputs import Raw
from qkd_jax.weights import registry
from qkd_jax.weights.load import backbone_of, load_backbone, tiny_random_text
from qkd_jax.weights.tokenizer import read_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bird", "##s", "sing"]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The golden weights as a registered encoder, with a vocabulary beside them."""
    entry = registry.Entry(
        name="tiny",
        source=registry.UrlSource("http://unreachable.invalid/model.safetensors"),
        file="tiny.safetensors",
        format="bert_safetensors",
        sha256=None,
        licence="none",
        spec=BertSpec(24, 3, 3, 48, vocabulary=70, positions=12, num_tokens=10),
        tokenizer=registry.TokenizerFile("http://unreachable.invalid/t", "t.json", None),
    )
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, entry))
    monkeypatch.delenv("QKD_JAX_WEIGHTS", raising=False)
    tensors = load_file(GOLDEN / "bert_tiny.safetensors")
    kept = {name: array for name, array in tensors.items() if not name.startswith("golden.")}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def test_weights_of_another_vocabulary_load_with_their_tokenizer(folder):
    backbone = load_backbone("tiny", path=folder, num_tokens=5, pooling="first")
    assert backbone.params["token"].shape == (50, 24) and backbone.spec.vocabulary == 50
    assert backbone.spec.num_tokens == 5 and backbone.spec.pooling == "first"
    found = qkd_jax.tokenize(backbone, ["A BIRDS"])["token_ids"]
    np.testing.assert_array_equal(found, [[2, 5, 6, 7, 3]])


def changed(definition, change):
    """A tokenizer.json with one part of it changed."""
    described = json.loads(definition)
    change(described)
    return json.dumps(described)


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda d: d["model"]["vocab"].update(bird=70), "found 71"),
        (lambda d: d["post_processor"].update(sep=["[SEP]", 99]), "found 100"),
        (lambda d: [d["model"]["vocab"].pop(w) for w in ("[UNK]", "a")], "Missing .UNK. token"),
        (lambda d: d.update(model={"type": "WordPiece", "vocab": 3}), "cannot be read as one"),
    ],
)
def test_a_tokenizer_that_would_fail_on_texts_is_refused_when_it_is_read(folder, change, found):
    definition = read_tokenizer(folder / "vocab.txt", 50).definition
    file = folder / "tokenizer.json"
    file.write_text(changed(definition, lambda _: None))
    assert read_tokenizer(file, 50).vocabulary == 9
    file.write_text(changed(definition, change))
    with pytest.raises(WeightsError, match=rf"tokenizer\.json: expected a tokenizer.*{found}"):
        read_tokenizer(file, 50)


def test_a_panic_in_the_library_of_tokens_is_an_error_too(folder, monkeypatch):
    class PanicException(BaseException):
        """As Rust raises it."""

    def panics(_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("qkd_jax.weights.tokenizer.Tokenizer", panics)
    with pytest.raises(WeightsError, match="index out of bounds"):
        read_tokenizer(folder / "vocab.txt", 50)


def test_a_vocabulary_with_capitals_is_cased(folder):
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "Bird"]))
    tokens = load_backbone("tiny", path=folder).preprocessing(["Bird bird"], 5)["token_ids"]
    np.testing.assert_array_equal(tokens, [[2, 9, 6, 3, 0]])
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    tokens = load_backbone("tiny", path=folder).preprocessing(["Bird bird"], 5)["token_ids"]
    np.testing.assert_array_equal(tokens, [[2, 6, 6, 3, 0]])


def test_tokenizer_json_comes_before_the_vocabulary(folder):
    definition = read_tokenizer(folder / "vocab.txt", 50).definition
    other = json.loads(definition)
    other["model"]["vocab"] |= {"bird": 11, "more": 6}
    (folder / "tokenizer.json").write_text(json.dumps(other))
    tokens = load_backbone("tiny", path=folder).preprocessing(["bird"], 4)["token_ids"]
    np.testing.assert_array_equal(tokens, [[2, 11, 3, 0]])


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(50))]))
    with pytest.raises(WeightsError, match="at most 50 tokens, as the weights have, found 59"):
        load_backbone("tiny", path=folder)
    for content in (b"", b"{", b"\xff\xfe", b'{"model": 3}'):
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(WeightsError, match=r"tokenizer.json: expected a tokenizer, found"):
            load_backbone("tiny", path=folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match=r"expected tokenizer.json or vocab.txt beside model"):
        load_backbone("tiny", path=folder)


def test_settings_of_the_other_kind_are_refused(folder):
    with pytest.raises(ConfigError, match="preprocessing: expected none, since tiny does not read"):
        load_backbone("tiny", path=folder, preprocessing="clip")
    with pytest.raises(ConfigError, match="num_tokens: expected none, since clip_vit_b16 does not"):
        load_backbone("clip_vit_b16", num_tokens=5)
    with pytest.raises(ConfigError, match="pooling: expected none, since tiny_random does not"):
        load_backbone("tiny_random", pooling="mean")
    with pytest.raises(ConfigError, match="num_tokens: expected 3 to 12"):
        load_backbone("tiny", path=folder, num_tokens=13)


def test_the_settings_of_a_run_name_the_backbone():
    config = qkd_jax.override(
        qkd_jax.Config(), "backbone.name=tiny_random_text", "backbone.num_tokens=7"
    )
    assert backbone_of(config.backbone).spec.num_tokens == 7
    config = qkd_jax.override(config, "backbone.pooling=first")
    assert backbone_of(config.backbone).spec.pooling == "first"
    with pytest.raises(ConfigError, match="preprocessing: expected none"):
        backbone_of(qkd_jax.override(config, "backbone.preprocess=clip").backbone)
    assert backbone_of(qkd_jax.Config(method="qkd").backbone.__class__(name="tiny_random")).spec


def test_wrong_files_are_recognised(folder, tmp_path):
    with pytest.raises(WeightsError, match="text encoder"):
        load_backbone("vit_b16_in21k_augreg", path=folder / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    tensors["bert.encoder.layer.3.output.dense.bias"] = np.zeros(24, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", path=folder)
    assert "found 2 problems" in str(caught.value)
    shutil.copy(GOLDEN / "vit_augreg.npz", folder / "model.npz")
    with pytest.raises(WeightsError, match=r"expected the ending .safetensors"):
        load_backbone("tiny", path=folder / "model.npz")


@pytest.mark.weights
def test_the_packaged_encoder_equals_transformers():
    """Last hidden state of three texts in one batch, within 1e-5 of the largest value."""
    with np.load(GOLDEN / "minilm.npz") as golden:
        golden = dict(golden)
    backbone = load_backbone("minilm_l6", num_tokens=golden["token_ids"].shape[1])
    fields = qkd_jax.tokenize(backbone, golden["texts"].tolist())
    np.testing.assert_array_equal(fields["token_ids"], golden["token_ids"])
    np.testing.assert_array_equal(fields["token_mask"], golden["token_mask"])
    found = np.asarray(jax.jit(lambda raw: encode(backbone, raw, rows=None))(Raw(fields)))
    real, hidden = golden["token_mask"], golden["hidden"]
    np.testing.assert_allclose(found[real], hidden[real], atol=1e-5 * np.abs(hidden).max())


def test_the_tiny_encoder_reads_characters():
    backbone = tiny_random_text()
    found = qkd_jax.tokenize(backbone, ["ab c"])
    assert found["token_mask"].sum() == 5 and found["token_ids"].max() < backbone.spec.vocabulary
