"""Marian models for tests: random tensors, files as Marian writes them, and a forward pass in float64.

Nothing here uses the library; names and formulas follow `src/models/transformer.h` of marian-dev.
"""

import io
import struct

import numpy as np
import sentencepiece

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()


def sentence(number, length):
    return " ".join(np.random.default_rng(number).choice(WORDS, length))


def pieces_model(size, reverse=False):
    """A SentencePiece model with Marian's special ids: the end of a sentence is 0, the unknown token 1."""
    lines = [sentence(100 + number, 6)[:: -1 if reverse else 1] for number in range(40)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        pad_id=-1,
        bos_id=-1,
        eos_id=0,
        unk_id=1,
        minloglevel=2,
    )
    return model.getvalue()


END = 3.0  # raises the logit of the end of a sentence

# The options of a model of version 1.9.56, each with the value that it has there.
OPTIONS = {
    "bert-train-type-embeddings": True,
    "bert-type-vocab-size": 2,
    "dec-cell": "gru",
    "dec-cell-base-depth": 2,
    "dec-cell-high-depth": 1,
    "dec-depth": 2,
    "dim-emb": 16,
    "dim-rnn": 1024,
    "dim-vocabs": [60, 60],
    "enc-cell": "gru",
    "enc-cell-depth": 1,
    "enc-depth": 1,
    "enc-type": "bidirectional",
    "input-types": [],
    "layer-normalization": False,
    "lemma-dim-emb": 0,
    "output-omit-bias": False,
    "right-left": False,
    "skip": False,
    "tied-embeddings": False,
    "tied-embeddings-all": True,
    "tied-embeddings-src": False,
    "transformer-aan-activation": "swish",
    "transformer-aan-depth": 2,
    "transformer-aan-nogate": False,
    "transformer-decoder-autoreg": "self-attention",
    "transformer-dim-aan": 2048,
    "transformer-dim-ffn": 24,
    "transformer-ffn-activation": "swish",
    "transformer-ffn-depth": 2,
    "transformer-guided-alignment-layer": "last",
    "transformer-heads": 2,
    "transformer-no-projection": False,
    "transformer-pool": False,
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-preprocess": "",
    "transformer-tied-layers": [],
    "transformer-train-position-embeddings": False,
    "type": "transformer",
    "ulr": False,
    "ulr-dim-emb": 0,
    "ulr-trainable-transformation": False,
    "version": "v1.9.56 94aeaa46 2021-04-28 00:28:35 +0100",
}
BEFORE = {
    "transformer-preprocess": "n",
    "transformer-postprocess": "da",
    "transformer-postprocess-top": "n",
}


def settings(options):
    """The YAML text, as the library yaml-cpp writes it."""

    def write(value):
        if isinstance(value, list):
            return "".join(f"\n  - {each}" for each in value) or " []"
        return {"True": " true", "False": " false", "": ' ""'}.get(str(value), f" {value}")

    return "".join(f"{name}:{write(value)}\n" for name, value in options.items())


def random_tensors(options, seed=0):
    """Random parameters by Marian's names; outputs end by themselves."""
    rng = np.random.default_rng(seed)
    width, inner, tensors = options["dim-emb"], options["transformer-dim-ffn"], {}
    before = "_pre" if options["transformer-preprocess"] == "n" else ""

    def matrix(name, rows, columns, gain=1.5):
        tensors[name] = rng.normal(0, gain * rows**-0.5, (rows, columns))

    def vector(name, size, mean=0.0):
        tensors[name] = rng.normal(mean, 0.2, (1, size))

    def norm(name, suffix):
        vector(f"{name}_ln_scale{suffix}", width, 1.0)
        vector(f"{name}_ln_bias{suffix}", width)

    for stack, depth in (("encoder", "enc-depth"), ("decoder", "dec-depth")):
        for layer in (f"{stack}_l{number + 1}" for number in range(options[depth])):
            recurrent = stack == "decoder" and options["transformer-decoder-autoreg"] == "rnn"
            attentions = ["self", "context"] if stack == "decoder" else ["self"]
            for attention in attentions[recurrent:]:
                for part in "qkvo":
                    matrix(f"{layer}_{attention}_W{part}", width, width)
                    vector(f"{layer}_{attention}_b{part}", width)
                norm(f"{layer}_{attention}_Wo", before)
            if recurrent:
                matrix(f"{layer}_rnn_W", width, width)
                matrix(f"{layer}_rnn_Wf", width, width)
                vector(f"{layer}_rnn_bf", width)
                norm(f"{layer}_rnn" if before else f"{layer}_rnn_ffn", before)
            matrix(f"{layer}_ffn_W1", width, inner)
            vector(f"{layer}_ffn_b1", inner)
            matrix(f"{layer}_ffn_W2", inner, width)
            vector(f"{layer}_ffn_b2", width)
            norm(f"{layer}_ffn_ffn", before)
        if options["transformer-postprocess-top"] == "n":
            norm(f"{stack}_top", "")
    source, target = options["dim-vocabs"]
    everything, one_side = options["tied-embeddings-all"], options["tied-embeddings-src"]
    separate = {"encoder_Wemb": source, "decoder_Wemb": target}
    for name, size in ({"Wemb": source} if everything or one_side else separate).items():
        matrix(name, size, width, gain=0.3 * size**0.5)
    if not (everything or options["tied-embeddings"]):
        matrix("decoder_ff_logit_out_Wt", target, width, gain=0.5 * target**0.5)
    if not options["output-omit-bias"]:
        vector("decoder_ff_logit_out_b", target)
        tensors["decoder_ff_logit_out_b"][0, 0] += END
    else:
        shift = tensors["decoder_top_ln_bias"][0]
        tensors["decoder_ff_logit_out_Wt"][0] += END * shift / (shift @ shift)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_npz(path, tensors, options):
    text = np.frombuffer(settings(options).encode() + b"\0", np.int8)
    np.savez(path, **tensors, **{"special:model.yml": text})


def write_bin(path, tensors, options, kind="float32"):
    """Writes a `.bin` file; with "intgemm8" matrices are quantized, and lie as Marian multiplies with them."""
    items = [("special:model.yml", 0x0101, (len(settings(options)) + 1,), settings(options).encode() + b"\0")]
    for name, tensor in tensors.items():
        if kind == "intgemm8" and tensor.shape[0] > 1:
            multiplier = np.float32(127 / np.abs(tensor).max())
            quantized = np.round(tensor * multiplier).astype(np.int8)
            lying = quantized if name.endswith("Wemb") else quantized.T
            items.append((name, 0x4101, tensor.shape, lying.tobytes() + multiplier.tobytes()))
            items.append((f"{name}_QuantMultA", 0x0404, (1, 1), np.float32(3).tobytes()))
        else:
            type_, dtype = (0x0402, "f2") if kind == "float16" else (0x0404, "f4")
            items.append((name, type_, tensor.shape, tensor.astype(dtype).tobytes()))
    items = [(name, type_, shape, data + bytes(-len(data) % 256)) for name, type_, shape, data in items]
    content = struct.pack("<2Q", 1, len(items))
    for name, type_, shape, data in items:
        content += struct.pack("<4Q", len(name) + 1, type_, len(shape), len(data))
    content += b"".join(name.encode() + b"\0" for name, *_ in items)
    content += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in items)
    padding = -(len(content) + 8) % 256
    content += struct.pack("<Q", padding) + bytes(padding) + b"".join(data for *_, data in items)
    path.write_bytes(content)


def forward(tensors, options, source, target):
    """The encoder's output [S, D] and the logits [T, V] of one sentence pair, in float64."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    width, heads = options["dim-emb"], options["transformer-heads"]
    before = options["transformer-preprocess"] == "n"
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    activation = {
        "relu": lambda x: np.maximum(x, 0),
        "swish": lambda x: x * sigmoid(x),
        "gelu": lambda x: x * sigmoid(1.702 * x),
    }[options["transformer-ffn-activation"]]

    def norm(x, name, suffix=""):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * tensors[f"{name}_ln_scale{suffix}"] + tensors[f"{name}_ln_bias{suffix}"]

    def around(x, name, sublayer, name_before=None):
        if before:
            return x + sublayer(norm(x, name_before or name, "_pre"))
        return norm(x + sublayer(x), name)

    def attention(name, queries, memory, causal=False):
        def project(x, part):
            projected = x @ tensors[f"{name}_W{part}"] + tensors[f"{name}_b{part}"]
            return projected.reshape(len(x), heads, width // heads).swapaxes(0, 1)

        query, key, value = project(queries, "q"), project(memory, "k"), project(memory, "v")
        scores = query @ key.swapaxes(1, 2) / np.sqrt(width // heads)
        if causal:
            scores = np.where(np.tri(len(queries)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        joined = (weights @ value).swapaxes(0, 1).reshape(len(queries), width)
        return joined @ tensors[f"{name}_Wo"] + tensors[f"{name}_bo"]

    def recurrence(name, x):
        outputs, cell = [], np.zeros(width)
        for row in x:
            forget = sigmoid(row @ tensors[f"{name}_Wf"] + tensors[f"{name}_bf"][0])
            cell = forget * cell + (1 - forget) * (row @ tensors[f"{name}_W"])
            outputs.append(np.maximum(cell, 0))
        return np.array(outputs)

    def feed_forward(name, x):
        inner = activation(x @ tensors[f"{name}_W1"] + tensors[f"{name}_b1"])
        return inner @ tensors[f"{name}_W2"] + tensors[f"{name}_b2"]

    def positions(count):
        angles = np.arange(count)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2 - 1))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def embed(name, ids):
        matrix = tensors.get(name, tensors.get("Wemb"))
        return np.sqrt(width) * matrix[ids]

    x = embed("encoder_Wemb", source) + positions(len(source))
    for layer in (f"encoder_l{number + 1}" for number in range(options["enc-depth"])):
        x = around(x, f"{layer}_self_Wo", lambda x, name=f"{layer}_self": attention(name, x, x))
        x = around(x, f"{layer}_ffn_ffn", lambda x, name=f"{layer}_ffn": feed_forward(name, x))
    memory = norm(x, "encoder_top") if before else x
    x = np.concatenate([np.zeros((1, width)), embed("decoder_Wemb", target[:-1])]) + positions(len(target))
    for layer in (f"decoder_l{number + 1}" for number in range(options["dec-depth"])):
        if options["transformer-decoder-autoreg"] == "rnn":
            names = (f"{layer}_rnn_ffn", lambda x, name=f"{layer}_rnn": recurrence(name, x), f"{layer}_rnn")
            x = around(x, *names)
        else:
            x = around(x, f"{layer}_self_Wo", lambda x, name=f"{layer}_self": attention(name, x, x, causal=True))
        x = around(x, f"{layer}_context_Wo", lambda x, name=f"{layer}_context": attention(name, x, memory))
        x = around(x, f"{layer}_ffn_ffn", lambda x, name=f"{layer}_ffn": feed_forward(name, x))
    x = norm(x, "decoder_top") if before else x
    output = tensors.get("decoder_ff_logit_out_Wt", tensors.get("decoder_Wemb", tensors.get("Wemb")))
    return memory, x @ output.T + tensors.get("decoder_ff_logit_out_b", 0.0)
