"""The packaged weights against ONNX Runtime running the packaged graphs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.nn import encode, layers
from qkd_jax.weights.fetch import fetch
from qkd_jax.weights.load import load_backbone


def run_graph(path, input_name, images, wanted):
    """Values of inner tensors of an ONNX graph; `images` [B, H, W, 3]."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(wanted, {input_name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})


def pictures(batch, side):
    """Smooth random pictures: noise alone is far from what the weights have seen."""
    rng = np.random.default_rng(7)
    coarse = rng.normal(size=(batch, 8, 8, 3)).astype(np.float32)
    smooth = np.asarray(jax.image.resize(coarse, (batch, side, side, 3), "cubic"))
    return smooth + 0.1 * rng.normal(size=smooth.shape).astype(np.float32)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def quantized_linear(params, x, dtype):
    """`layers.linear` with its input rounded as DynamicQuantizeLinear does: one uint8 scale."""
    low, high = jnp.minimum(x.min(), 0.0), jnp.maximum(x.max(), 0.0)
    scale = (high - low) / 255.0
    zero = jnp.clip(jnp.round(-low / scale), 0.0, 255.0)
    rounded = jnp.clip(jnp.round(x / scale) + zero, 0.0, 255.0)
    return PLAIN_LINEAR(params, (rounded - zero) * scale, dtype)


PLAIN_LINEAR = layers.linear


@pytest.mark.weights
def test_packaged_clip_equals_its_graph_block_by_block(monkeypatch):
    backbone = load_backbone("clip_vit_b16")
    params, spec = backbone.params, backbone.spec
    images = pictures(1, 224)
    blocks = [f"/vision_model/encoder/layers.{i}/Add_1_output_0" for i in range(11)]
    wanted = ["/vision_model/pre_layrnorm/Add_1_output_0", *blocks, "onnx::Gather_1524"]
    wanted += ["/vision_model/post_layernorm/Add_1_output_0", "image_embeds"]
    *stages, feature, embedding = run_graph(fetch("clip_vit_b16"), "pixel_values", images, wanted)
    # The embedding is float32 on both sides: sums of 768 terms.
    embedded = encode.embed(params, spec, images)
    assert np.abs(embedded - stages[0]).max() / np.abs(stages[0]).max() < 5e-6
    # The graph rounds every Linear input to 8 bits. With its own block inputs and that rounding
    # repeated, what is left are values that float noise moves across a rounding edge: one such
    # value differs by a whole step of 1/255 of its tensor's range. Without the repetition the
    # errors are 2e-2 to 1e-1; a wrong formula shows at order 1.
    monkeypatch.setattr(layers, "linear", quantized_linear)
    monkeypatch.setattr(encode, "linear", quantized_linear)
    run = jax.jit(lambda p, x: encode.block(p, spec, x))
    errors = [
        relative(run(p, before) - before, after - before)
        for p, before, after in zip(params["blocks"], stages, stages[1:], strict=False)
    ]
    print("relative error of each block's update:", " ".join(f"{e:.1e}" for e in errors))
    assert len(errors) == 12
    assert max(errors) < 2e-2 and np.median(errors) < 3e-3
    # The last norm is float32; the projection's input is rounded again.
    found = layers.layer_norm(params["norm"], jnp.asarray(stages[-1][:, 0]), spec.eps)
    assert relative(found, feature) < 1e-5
    projected = quantized_linear(
        {"kernel": params["projection"]}, jnp.asarray(feature), jnp.float32
    )
    assert relative(projected, embedding) < 1e-3


@pytest.mark.slow
@pytest.mark.weights
def test_packaged_dinov2_equals_its_graph():
    backbone = load_backbone("dinov2_vit_s14")
    params, spec = backbone.params, backbone.spec
    images = pictures(2, 224)
    blocks = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    wanted = ["/backbone/embeddings/Add_output_0", *blocks, "/backbone/layernorm/Add_1_output_0"]
    stages = run_graph(fetch("dinov2_vit_s14"), "input_image", images, wanted)
    results = jax.jit(lambda x: encode.encode_all(params, spec, x))(images)
    # The position grid is resampled in float32 on one side; then 12 blocks of float32 sums.
    errors = [relative(a, b) for a, b in zip(results, stages, strict=True)]
    print("relative error after each stage:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 2e-5
    feature = jax.jit(lambda x: encode.encode(params, spec, x))(images)
    assert relative(feature, stages[-1][:, 0]) < 2e-5
