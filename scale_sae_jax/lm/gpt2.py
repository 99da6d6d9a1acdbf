"""GPT-2: learned positions, LayerNorm with bias, fused qkv, GELU.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scale_sae_jax.errors import UserError
from scale_sae_jax.lm.attention import attend, segment_positions
from scale_sae_jax.lm.decoder import Decoder
from scale_sae_jax.lm.gguf import GGUF, field
from scale_sae_jax.lm.weights import Stored, transpose

HF_PREFIX = "transformer."
IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks that old checkpoints carry
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT-2; `tanh_gelu` for the published tanh form, else the exact GELU."""

    width: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    max_context: int
    norm_eps: float
    tanh_gelu: bool = True
    tied: bool = True


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B S D"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        c = self.config
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        norm = partial(_layer_norm, c, self.dtype)

        fused = nn.DenseGeneral((3, c.width), dtype=self.dtype, param_dtype=self.dtype, name="qkv")
        qkv = fused(norm(name="attn_norm")(hidden))  # [B, S, 3, D]
        q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:3], c.heads, -1), 2, 0)  # [B, S, H, C] each
        hidden = hidden + dense(c.width, name="o")(attend(q, k, v, segments))

        up = dense(c.ffn, name="up")(norm(name="mlp_norm")(hidden))
        return hidden + dense(c.width, name="down")(jax.nn.gelu(up, approximate=c.tanh_gelu))


class Model(Decoder):
    """GPT-2 of any size."""

    def setup(self):
        super().setup()
        c = self.config
        shape = (c.max_context, c.width)
        self.positions = self.param("positions", nn.initializers.normal(0.01), shape, self.dtype)

    def block(self) -> nn.Module:
        return Block(self.config, self.dtype, parent=None)

    def norm(self) -> nn.Module:
        return _layer_norm(self.config, self.dtype)

    def embed(
        self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        return self.embedding[tokens] + self.positions[segment_positions(segments)]


def _layer_norm(config: Config, dtype: Any, name: str | None = None) -> nn.Module:
    return nn.LayerNorm(
        config.norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name
    )


def config_from_hf(hf: Any) -> Config:
    """Sizes from a transformers GPT2Config. Raises UserError for a variant that is not GPT-2's."""
    known = (*_TANH_GELU, "gelu")
    if hf.activation_function not in known:
        raise UserError(
            f"GPT-2 with activation_function '{hf.activation_function}' is not supported: "
            f"only {', '.join(known)}"
        )
    if not hf.scale_attn_weights or hf.scale_attn_by_inverse_layer_idx or hf.add_cross_attention:
        raise UserError(
            "GPT-2 with unscaled, layer-scaled or cross attention is not supported: convert the "
            "model to plain GPT-2"
        )
    return Config(
        width=hf.n_embd,
        layers=hf.n_layer,
        heads=hf.n_head,
        ffn=hf.n_inner or 4 * hf.n_embd,
        vocab=hf.vocab_size,
        max_context=hf.n_positions,
        norm_eps=hf.layer_norm_epsilon,
        tanh_gelu=hf.activation_function in _TANH_GELU,
        tied=hf.tie_word_embeddings,
    )


def hf_tensors(config: Config) -> dict[str, Stored]:
    """Names in a Hugging Face checkpoint, whose Conv1D weights are [in, out] as ours are."""
    tensors = {
        "embedding": Stored("wte.weight"),
        "positions": Stored("wpe.weight"),
        "unembedding": Stored("lm_head.weight"),
        **_norm("final_norm", "ln_f"),
        **_norm("blocks/attn_norm", "h.{}.ln_1"),
        **_norm("blocks/mlp_norm", "h.{}.ln_2"),
    }
    for ours, name in {
        "qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"
    }.items():
        turn = _split_qkv if ours == "qkv" else np.asarray
        tensors[f"blocks/{ours}/kernel"] = Stored(f"h.{{}}.{name}.weight", turn)
        tensors[f"blocks/{ours}/bias"] = Stored(f"h.{{}}.{name}.bias", turn)
    return tensors


def config_from_gguf(file: GGUF) -> Config:
    """Sizes from the header of a GGUF file. Raises UserError for a missing key."""
    metadata = file.metadata
    return Config(
        width=field(metadata, "gpt2.embedding_length", int),
        layers=field(metadata, "gpt2.block_count", int),
        heads=field(metadata, "gpt2.attention.head_count", int),
        ffn=field(metadata, "gpt2.feed_forward_length", int),
        vocab=file.rows("token_embd.weight"),
        max_context=field(metadata, "gpt2.context_length", int),
        norm_eps=field(metadata, "gpt2.attention.layer_norm_epsilon", float),
        tied="output.weight" not in file.tensors,
    )


def gguf_tensors(config: Config) -> dict[str, Stored]:
    """Names in a GGUF file, whose matrices are all [out, in]."""
    tensors = {
        "embedding": Stored("token_embd.weight"),
        "positions": Stored("position_embd.weight"),
        "unembedding": Stored("output.weight"),
        **_norm("final_norm", "output_norm"),
        **_norm("blocks/attn_norm", "blk.{}.attn_norm"),
        **_norm("blocks/mlp_norm", "blk.{}.ffn_norm"),
    }
    for ours, name in {
        "qkv": "attn_qkv", "o": "attn_output", "up": "ffn_up", "down": "ffn_down"
    }.items():
        split = _split_qkv if ours == "qkv" else np.asarray
        kernel = Stored(f"blk.{{}}.{name}.weight", lambda w, split=split: split(transpose(w)))
        tensors[f"blocks/{ours}/kernel"] = kernel
        tensors[f"blocks/{ours}/bias"] = Stored(f"blk.{{}}.{name}.bias", split)
    return tensors


def _norm(ours: str, name: str) -> dict[str, Stored]:
    return {f"{ours}/scale": Stored(f"{name}.weight"), f"{ours}/bias": Stored(f"{name}.bias")}


def _split_qkv(w: np.ndarray) -> np.ndarray:
    """[..., 3D] to [..., 3, D]."""
    return w.reshape(*w.shape[:-1], 3, -1) if w.shape[-1] % 3 == 0 else w
