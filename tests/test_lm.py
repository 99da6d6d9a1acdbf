"""Both families against transformers' PyTorch models of the same random weights."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from scale_sae_jax.config import LMConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.lm import (
    ModelSummary,
    inspect_language_model,
    load_language_model,
    weights,
)
from scale_sae_jax.lm.attention import attention_mask, segment_positions

VOCAB, WIDTH, LAYERS, CONTEXT = 96, 32, 3, 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def torch_model(kind, folder, **save):
    """A small random model, saved to `folder` with a tokenizer; larger weights than at init."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        torch.manual_seed(0)
        if kind.startswith("gpt2"):
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=CONTEXT
                )
            )
        else:
            rope = LLAMA3 if "llama3" in kind else {"rope_type": "default", "rope_theta": 1e4}
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=VOCAB,
                    hidden_size=WIDTH,
                    intermediate_size=48,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=CONTEXT,
                    rope_parameters=rope,
                    tie_word_embeddings="untied" not in kind,
                )
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.eval().save_pretrained(folder, **save)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder):
    """Words w1 ... w49; id 0 is <|endoftext|>."""
    vocab = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 50)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_language_model(LMConfig(path=str(folder), **settings))


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama3_untied"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return torch_model(request.param, folder), load(folder)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2_folder")
    torch_model("gpt2", folder)
    return folder


def padded_rows(side):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, VOCAB, (3, CONTEXT), dtype=np.int32)
    segments = np.ones((3, CONTEXT), np.int32)
    for row, padding in enumerate((0, 5, CONTEXT - 1)):
        where = slice(0, padding) if side == "left" else slice(CONTEXT - padding, CONTEXT)
        segments[row, where] = 0
    return tokens, segments


def torch_states(model, tokens, segments):
    """Outputs of every block before the final norm, and logits."""
    import torch

    outputs = []
    body = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in body
    ]
    real = torch.tensor(segments)
    with torch.no_grad():
        result = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=real,
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
        )
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs).numpy(), result.logits.numpy()


def assert_close(ours, theirs, relative=1e-4):
    """Largest difference against the largest value, at each level of the first axis."""
    for a, b in zip(np.asarray(ours, np.float32), theirs, strict=True):
        assert np.abs(a - b).max() <= relative * np.abs(b).max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_agrees_with_transformers_on_padded_rows(pair, side):
    model, lm = pair
    tokens, segments = padded_rows(side)
    states, logits = torch_states(model, tokens, segments)
    real = segments > 0
    ours = np.stack([lm.run_to(lm.params, tokens, segments, layer) for layer in range(LAYERS)])
    assert ours.shape == (LAYERS, 3, CONTEXT, WIDTH)
    assert_close(ours[:, real], states[:, real])
    assert_close(lm.logits(lm.params, tokens, segments)[real][None], logits[real][None])
    assert np.isfinite(ours).all()  # padding included


def test_run_to_and_from_are_the_whole_model(pair):
    _, lm = pair
    tokens, segments = padded_rows("right")
    logits = lm.logits(lm.params, tokens, segments)
    assert logits.dtype == jnp.float32 and logits.shape == (3, CONTEXT, VOCAB)
    for layer in range(LAYERS):
        hidden = lm.run_to(lm.params, tokens, segments, layer)
        resumed = lm.run_from(lm.params, hidden, segments, layer)
        np.testing.assert_allclose(resumed, logits, rtol=1e-4, atol=1e-4)
    changed = lm.run_from(lm.params, jnp.zeros_like(hidden), segments, 0)
    assert np.abs(changed - logits).max() > 0.1


def test_run_to_computes_only_the_blocks_it_needs(pair):
    _, lm = pair
    tokens, segments = padded_rows("right")
    poisoned = {
        **lm.params,
        "blocks": jax.tree.map(lambda p: p.at[2].set(jnp.nan), lm.params["blocks"]),
    }
    assert np.isfinite(lm.run_to(poisoned, tokens, segments, 1)).all()
    assert np.isnan(lm.run_to(poisoned, tokens, segments, 2)).all()


def test_packed_segments_equal_separate_rows(pair):
    _, lm = pair
    tokens = np.random.default_rng(2).integers(1, VOCAB, (1, CONTEXT), dtype=np.int32)
    lengths = (7, 1, 11)
    segments = np.repeat([1, 2, 3, 0], [*lengths, CONTEXT - sum(lengths)])[None].astype(np.int32)
    packed = lm.logits(lm.params, tokens, segments)[0]
    start = 0
    for length in lengths:
        alone = tokens[:, start : start + length]
        expected = lm.logits(lm.params, alone, np.ones_like(alone))[0]
        np.testing.assert_allclose(packed[start : start + length], expected, rtol=1e-4, atol=1e-4)
        start += length


def test_positions_and_mask_by_hand():
    segments = jnp.array([[0, 0, 4, 4, 4, 2, 2, 0]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1, 0]]
    mask = attention_mask(segments)[0]
    assert mask[4].tolist() == [False, False, True, True, True, False, False, False]
    assert mask[5].tolist() == [False] * 5 + [True, False, False]
    assert jnp.diag(mask).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama_untied"])
def test_bfloat16_is_close_and_stays_bfloat16(kind, tmp_path):
    torch_model(kind, tmp_path)
    full, half = load(tmp_path), load(tmp_path, dtype="bfloat16")
    tokens, segments = padded_rows("right")
    assert {p.dtype for p in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert half.run_to(half.params, tokens, segments, 1).dtype == jnp.bfloat16
    logits = half.logits(half.params, tokens, segments)
    assert logits.dtype == jnp.float32
    real = segments > 0
    assert_close(logits[real][None], full.logits(full.params, tokens, segments)[real][None], 0.05)


@pytest.mark.parametrize("kind", ["gpt2", "llama_untied"])
def test_half_precision_and_sharded_checkpoints(kind, tmp_path):
    import torch

    model = torch_model(kind, tmp_path / "whole")
    whole = load(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    write_tokenizer(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = load(tmp_path / "shards")
    jax.tree.map(np.testing.assert_array_equal, shards.params, whole.params)
    assert shards.sha256 != whole.sha256 == load(tmp_path / "whole").sha256

    for dtype, ours in ((torch.bfloat16, jnp.bfloat16), (torch.float16, jnp.float16)):
        folder = tmp_path / str(ours.__name__)
        model.to(dtype).save_pretrained(folder)
        write_tokenizer(folder)
        cast = jax.tree.map(lambda p, ours=ours: p.astype(ours).astype(p.dtype), whole.params)
        if dtype == torch.bfloat16:  # float16 comes from bfloat16 then: not the same rounding
            jax.tree.map(np.testing.assert_array_equal, load(folder).params, cast)
        else:
            assert np.isfinite(load(folder).params["embedding"]).all()


def test_body_without_head_prefix(tmp_path):
    """Checkpoints of the bare body (GPT2Model) have no 'transformer.' before their names."""
    model = torch_model("gpt2", tmp_path / "head")
    model.transformer.save_pretrained(tmp_path / "body")
    write_tokenizer(tmp_path / "body")
    head, body = load(tmp_path / "head"), load(tmp_path / "body")
    jax.tree.map(np.testing.assert_array_equal, head.params, body.params)


def test_inspect_reads_only_the_config(gpt2_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((gpt2_folder / "config.json").read_bytes())
    summary = inspect_language_model(LMConfig(path=str(tmp_path)))
    assert summary == ModelSummary("gpt2", WIDTH, LAYERS, VOCAB, CONTEXT)


def test_rows_longer_than_the_positions_are_refused(pair):
    _, lm = pair
    tokens = np.ones((1, CONTEXT + 1), np.int32)
    with pytest.raises(UserError, match="lower config.text.context"):
        lm.run_to(lm.params, tokens, tokens, 0)
    with pytest.raises(UserError, match="layers 0 to 2"):
        lm.run_to(lm.params, tokens[:, :4], tokens[:, :4], LAYERS)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sizes_that_do_not_fit_name_the_tensor(tmp_path):
    torch_model("llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=LAYERS + 1)
    with pytest.raises(UserError, match=r"no tensor 'layers\.3\."):
        load(tmp_path)
    edit_config(tmp_path, num_hidden_layers=LAYERS - 1)
    with pytest.raises(UserError, match=r"tensor 'layers\.2\..*no place"):
        load(tmp_path)
    edit_config(tmp_path, num_hidden_layers=LAYERS, intermediate_size=40)
    with pytest.raises(UserError, match=r"'layers\.0\.mlp\.\w+\.weight' has shape"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"model_type": "bert"}, "'bert' is not supported"),
        ("gpt2", {"model_type": ["gpt2"]}, "no model config with a model_type"),
        ("gpt2", {"activation_function": "relu"}, "'relu' is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "layer-scaled"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, "yarn"),
        ("llama", {"num_key_value_heads": 3}, "does not fit"),
        ("llama", {"hidden_size": "wide"}, "not a valid llama config"),
    ],
)
def test_unsupported_variants_are_refused(kind, changes, message, tmp_path):
    torch_model(kind, tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_damaged_and_missing_files_are_refused(gpt2_folder, tmp_path):
    def copy(*names):
        for name in names:
            (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())

    with pytest.raises(UserError, match="config.json"):
        load(tmp_path)
    copy("config.json", "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(UserError, match="no model.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        load(tmp_path)
    weights = (gpt2_folder / "model.safetensors").read_bytes()
    for damaged in (weights[:-9], weights[:5], b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or no safetensors"):
            load(tmp_path)
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks the shard"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        load(tmp_path)


def test_layer_and_path_are_checked_before_weights(gpt2_folder, tmp_path):
    with pytest.raises(UserError, match="config.lm.layer = 3 .* layers 0 to 2"):
        load(gpt2_folder, layer=3)
    with pytest.raises(UserError, match="no file or folder"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="pip install"):
        load("package:no-such-distribution-here")


def test_hub_failure_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="--config.lm.path=FOLDER") as caught:
        load("someone/some-model")
    assert "\n" not in str(caught.value)


def test_of_a_large_file_samples_from_end_to_end_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "HASHED_BYTES", 100)
    monkeypatch.setattr(weights, "SAMPLES", 5)
    monkeypatch.setattr(weights, "SAMPLE_BYTES", 8)
    path = tmp_path / "model.safetensors"
    content = bytes(range(200))

    def digest(changed=()):
        path.write_bytes(bytes(0xFF - b if i in changed else b for i, b in enumerate(content)))
        return weights.digest([path])

    whole = digest()
    samples = {i for start in (0, 48, 96, 144, 192) for i in range(start, start + 8)}
    assert samples == {i for i in range(200) if digest([i]) != whole}
    monkeypatch.setattr(weights, "HASHED_BYTES", 200)
    assert digest() != whole and digest([20]) != digest()
