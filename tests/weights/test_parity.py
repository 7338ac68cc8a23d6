"""The packaged weights against ONNX Runtime running the packaged graphs, both in float32.

The CLIP graph rounds the input of every Linear layer to 8 bits. That noise is not what is tested,
and it differs between processors: without VNNI, ONNX Runtime adds products of bytes in 16 bits,
which saturate. So the integer products are replaced by float32 ones of the same int8 kernels,
which are exact in float32; everything else of the graph, its scales too, stays as it is.

Error budget. Both sides round to float32 (u = 2^-24 = 6e-8) and add in different orders. A sum of K
terms of random sign, added one by one, errs by u sqrt(K / 6) of its size: 1.4e-6 for K = 3072, the
widest, and less when it is split over vector lanes. A block chains five such sums on each of the
two sides: at most sqrt(10) * 1.4e-6 = 4e-6 of its update. Twice that leaves room for the functions
(exp, sigmoid, erf: a few u) and holds for any vector width, with fused multiply-add or without.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qkd_jax.nn import encode, layers
from qkd_jax.nn.inputs import Raw
from qkd_jax.weights.fetch import fetch
from qkd_jax.weights.load import load_backbone

BLOCK = 8e-6


def without_rounding(graph):
    """Give every MatMulInteger its float32 input instead of the one rounded to 8 bits.

    (rounded x, scale, zero point) = DynamicQuantizeLinear(x) becomes (x, 1), and the product with
    an int8 kernel one with the same kernel as float32. The graph's own scaling nodes follow.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            (source,), (rounded, scale, _) = node.input, node.output
            graph.initializer.append(numpy_helper.from_array(np.float32(1.0), scale))
            nodes.append(helper.make_node("Identity", [source], [rounded]))
        elif node.op_type == "MatMulInteger":
            source, kernel, _, zero = node.input
            assert not numpy_helper.to_array(constants[zero]).any()
            floats = f"{kernel}_float"
            nodes.append(helper.make_node("Cast", [kernel], [floats], to=onnx.TensorProto.FLOAT))
            nodes.append(helper.make_node("MatMul", [source, floats], node.output))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    assert not any("Integer" in node.op_type or "Quantize" in node.op_type for node in nodes)


def run_graph(path, input_name, images, wanted):
    """Values of inner tensors of an ONNX graph, in float32; `images` [B, H, W, 3]."""
    import onnxruntime

    model = onnx.load(str(path))
    without_rounding(model.graph)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # One run: the graph as it is written starts faster than an optimised one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(wanted, {input_name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})


def pictures(batch, side):
    """Coarse random fields with some noise [batch, side, side, 3]."""
    rng = np.random.default_rng(7)
    coarse = rng.normal(size=(batch, 8, 8, 3)).repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    return (coarse + 0.1 * rng.normal(size=coarse.shape)).astype(np.float32)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.weights
def test_packaged_clip_equals_its_graph_block_by_block():
    file = fetch("clip_vit_b16")
    backbone = load_backbone("clip_vit_b16", path=file)
    params, spec = backbone.params, backbone.spec
    images = pictures(1, 224)
    blocks = [f"/vision_model/encoder/layers.{i}/Add_1_output_0" for i in range(11)]
    wanted = ["/vision_model/pre_layrnorm/Add_1_output_0", *blocks, "onnx::Gather_1524"]
    wanted += ["/vision_model/post_layernorm/Add_1_output_0"]
    *stages, feature = run_graph(file, "pixel_values", images, wanted)
    run = jax.jit(lambda p, x: encode.block(p, spec, x))
    with jax.default_matmul_precision("highest"):
        # Each block gets the graph's own input, so that an error shows where it is made, and is
        # compared by what it adds, which is smaller than what it passes on.
        errors = [
            relative(run(p, before) - before, after - before)
            for p, (before, after) in zip(params["blocks"], pairwise(stages), strict=True)
        ]
        print("relative error of each block's update:", " ".join(f"{e:.1e}" for e in errors))
        assert len(errors) == 12 and max(errors) < BLOCK
        # One sum and one norm at each end.
        assert (
            relative(
                encode.embed(backbone.replace(preprocessing=None), Raw({"image": images})).stream,
                stages[0],
            )
            < BLOCK
        )
        found = layers.layer_norm(params["norm"], jnp.asarray(stages[-1][:, 0]), spec.eps)
        assert relative(found, feature) < BLOCK


@pytest.mark.slow
@pytest.mark.weights
def test_packaged_dinov2_equals_its_graph():
    backbone = load_backbone("dinov2_vit_s14").replace(preprocessing=None)
    images = pictures(2, 224)
    blocks = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    wanted = ["/backbone/embeddings/Add_output_0", *blocks, "/backbone/layernorm/Add_1_output_0"]
    stages = run_graph(fetch("dinov2_vit_s14"), "input_image", images, wanted)
    with jax.default_matmul_precision("highest"):
        results = jax.jit(lambda x: encode.encode_all(backbone, Raw({"image": x})))(images)
        feature = jax.jit(lambda x: encode.encode(backbone, Raw({"image": x}))[:, 0])(images)
    # Here the errors of 12 blocks add up, independent of each other: sqrt(12) times one block's.
    errors = [relative(a, b) for a, b in zip(results, stages, strict=True)]
    print("relative error after each stage:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 12**0.5 * BLOCK
    assert relative(feature, stages[-1][:, 0]) < 12**0.5 * BLOCK
