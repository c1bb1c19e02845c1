"""Builds a language model of random weights, for tests and the example: the same files each time.

    tiny-onnx.py DIRECTORY

writes, as transformers.js wants it: config.json, generation_config.json and in onnx/
    model.onnx       past_key_values and present in float32, as exports for text generation have them
    model_fp16.onnx  the same, with them in float16
and, for what the cache has to notice:
    no_cache.onnx    without them
    external.onnx    with weights in external.bin
"""

import json
import pathlib
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, FEED_FORWARD = 256, 32, 2, 4, 2, 8, 64
EPSILON, ROPE_THETA = 1e-5, 10_000


class Graph:
    """Nodes and weights, and their names."""

    def __init__(self):
        self.random = np.random.default_rng(7)
        self.nodes, self.weights = [], {}

    def __getattr__(self, operator):
        """`graph.Mul(a, b)` adds a node and returns the name of its output."""

        def add(*inputs, name=None, **attributes):
            output = name or f"t{len(self.nodes)}"
            self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
            return output

        return add

    def constant(self, value, dtype=np.int64):
        return self.weight(f"c{len(self.weights)}", np.array(value, dtype))

    def weight(self, name, value):
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def matrix(self, name, rows, columns, scale=0.9):
        values = self.random.standard_normal((rows, columns)) * (scale / np.sqrt(rows))
        return self.weight(name, values.astype(np.float32))

    def ints(self, *values):
        return self.constant(values)


def build(kv_type):
    """The model; `kv_type` is that of its past_key_values and present, or None for a model without them."""
    g = Graph()
    embedding = g.random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    x = g.Gather(g.weight("embedding", embedding), "input_ids", axis=0)
    length = g.Gather(g.Shape("input_ids"), g.constant(1))
    past = g.Gather(g.Shape("past_key_values.0.key"), g.constant(2)) if kv_type else g.constant(0)
    rotation = rope(g)
    mask = causal_mask(g, length, past)
    inputs, outputs = [], []
    for layer in range(LAYERS):
        y = norm(g, x, f"norm_{layer}")
        q, k, v = (
            heads_apart(g, y, f"{name}_{layer}", count, scale)
            for name, count, scale in (("q", HEADS, 2.5), ("k", KV_HEADS, 2.5), ("v", KV_HEADS, 0.9))
        )
        q, k = rotate(g, q, rotation), rotate(g, k, rotation)
        kv = {"key": k, "value": v}
        if kv_type:
            for name, new in kv.items():
                whole = g.Concat(
                    f"past_key_values.{layer}.{name}",
                    g.Cast(new, to=kv_type),
                    name=f"present.{layer}.{name}",
                    axis=2,
                )
                kv[name] = g.Cast(whole, to=TensorProto.FLOAT)
                for values, prefix, tokens in ((inputs, "past_key_values", "past"), (outputs, "present", "total")):
                    shape = ["batch", KV_HEADS, tokens, HEAD_SIZE]
                    values.append(helper.make_tensor_value_info(f"{prefix}.{layer}.{name}", kv_type, shape))
        x = g.Add(x, attention(g, q, kv["key"], kv["value"], mask, layer))
        y = norm(g, x, f"norm_feed_forward_{layer}")
        up = g.Relu(g.MatMul(y, g.matrix(f"up_{layer}", HIDDEN, FEED_FORWARD)))
        x = g.Add(x, g.MatMul(up, g.matrix(f"down_{layer}", FEED_FORWARD, HIDDEN)))
    g.MatMul(norm(g, x, "norm"), g.matrix("head", HIDDEN, VOCABULARY), name="logits")

    def ids(name, tokens):
        return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", tokens])

    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY])
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [ids("input_ids", "tokens"), ids("attention_mask", "total"), ids("position_ids", "tokens"), *inputs],
        [logits, *outputs],
        list(g.weights.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def rope(g):
    """Cosines and sines of the positions, [batch, 1, tokens, half a head]."""
    frequencies = 1 / ROPE_THETA ** (np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    position = g.Unsqueeze(g.Cast("position_ids", to=TensorProto.FLOAT), g.ints(1, 3))
    angle = g.Mul(position, g.constant(frequencies, np.float32))
    return g.Cos(angle), g.Sin(angle)


def rotate(g, x, rotation):
    cosine, sine = rotation
    half = HEAD_SIZE // 2
    a = g.Slice(x, g.ints(0), g.ints(half), g.ints(3))
    b = g.Slice(x, g.ints(half), g.ints(HEAD_SIZE), g.ints(3))
    return g.Concat(
        g.Sub(g.Mul(a, cosine), g.Mul(b, sine)), g.Add(g.Mul(b, cosine), g.Mul(a, sine)), axis=3
    )


def causal_mask(g, length, past):
    """0 where a token sees another one, else a large negative number, [batch, 1, tokens, total]."""
    total, zero, one = g.Add(length, past), g.constant(0), g.constant(1)
    seen = g.Unsqueeze(g.Range(zero, total, one), g.ints(0))
    seeing = g.Unsqueeze(g.Range(past, total, one), g.ints(1))
    before = g.Unsqueeze(g.LessOrEqual(seen, seeing), g.ints(0, 1))
    given = g.Unsqueeze(g.Cast("attention_mask", to=TensorProto.BOOL), g.ints(1, 2))
    return g.Where(g.And(before, given), g.constant(0, np.float32), g.constant(-1e9, np.float32))


def norm(g, x, name):
    mean = g.ReduceMean(g.Mul(x, x), g.ints(-1), keepdims=1)
    root = g.Sqrt(g.Add(mean, g.constant(EPSILON, np.float32)))
    return g.Mul(g.Div(x, root), g.weight(name, np.ones(HIDDEN, np.float32)))


def heads_apart(g, x, name, count, scale):
    """[batch, tokens, hidden] to [batch, count, tokens, head size]."""
    flat = g.MatMul(x, g.matrix(name, HIDDEN, count * HEAD_SIZE, scale))
    return g.Transpose(g.Reshape(flat, g.ints(0, 0, count, HEAD_SIZE)), perm=[0, 2, 1, 3])


def attention(g, q, k, v, mask, layer):
    """Each KV head serves a group of heads: [batch, KV heads, group, tokens, head size]."""
    group = HEADS // KV_HEADS
    q = g.Reshape(q, g.ints(0, KV_HEADS, group, -1, HEAD_SIZE))
    k, v = g.Unsqueeze(k, g.ints(2)), g.Unsqueeze(v, g.ints(2))
    score = g.MatMul(q, g.Transpose(k, perm=[0, 1, 2, 4, 3]))
    score = g.Mul(score, g.constant(1 / np.sqrt(HEAD_SIZE), np.float32))
    weights = g.Softmax(g.Add(score, g.Unsqueeze(mask, g.ints(1))), axis=-1)
    mixed = g.Reshape(g.MatMul(weights, v), g.ints(0, HEADS, -1, HEAD_SIZE))
    flat = g.Reshape(g.Transpose(mixed, perm=[0, 2, 1, 3]), g.ints(0, 0, HEADS * HEAD_SIZE))
    return g.MatMul(flat, g.matrix(f"o_{layer}", HEADS * HEAD_SIZE, HIDDEN, 2.5))


def main(directory):
    files = directory / "onnx"
    files.mkdir(parents=True, exist_ok=True)
    model = build(TensorProto.FLOAT)
    onnx.save(model, files / "model.onnx")
    onnx.save(build(TensorProto.FLOAT16), files / "model_fp16.onnx")
    onnx.save(build(None), files / "no_cache.onnx")
    (files / "external.bin").unlink(missing_ok=True)
    onnx.save(model, files / "external.onnx", save_as_external_data=True, location="external.bin", size_threshold=256)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))


main(pathlib.Path(sys.argv[1]))
