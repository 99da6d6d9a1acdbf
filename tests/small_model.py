"""A small random GPT-2 with a byte-level tokenizer, as a folder that the library loads."""

import json
import warnings

import tokenizers

VOCAB, WIDTH = 400, 32


def write_model(folder, documents, layers=2, context=64, words=()):
    """words: strings that become one token each, whatever surrounds them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": layers, "n_head": 2,
                 "n_positions": context}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    sizes = {"vocab_size": VOCAB - len(words), "initial_alphabet": byte_level.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(**sizes, **special)
    backend.train_from_iterator(documents[:20], trainer)
    backend.add_tokens(list(words))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
