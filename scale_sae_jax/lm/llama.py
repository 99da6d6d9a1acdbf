"""The Llama family: rotary positions, RMSNorm, grouped-query attention, SwiGLU, no biases.

Touvron et al. 2023, "LLaMA", section 2.2; rotary embedding: Su et al. 2021, "RoFormer", 3.2.
"""

import math
from collections.abc import Mapping
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

HF_PREFIX = "model."
MAX_HEAD_WIDTH = 1 << 14
IGNORED = (".rotary_emb.inv_freq",)  # derived, in old checkpoints


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama. frequencies: C/2 angles a position step, in radians, RoPE scaling done."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocab: int
    max_context: int
    norm_eps: float
    frequencies: tuple[float, ...]
    tied: bool


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B S D"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        c = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)
        norm = partial(nn.RMSNorm, c.norm_eps, dtype=self.dtype, param_dtype=self.dtype)

        def heads(x: Array, count: int, name: str) -> Array:  # [B, S, count, C]
            projected = dense(count * c.head_width, name=name)(x)
            return projected.reshape(*x.shape[:2], count, c.head_width)

        x = norm(name="attn_norm")(hidden)
        q, k, v = heads(x, c.heads, "q"), heads(x, c.kv_heads, "k"), heads(x, c.kv_heads, "v")
        angles = segment_positions(segments)[..., None] * jnp.array(c.frequencies, jnp.float32)
        mixed = attend(rotate(q, angles), rotate(k, angles), v, segments)
        hidden = hidden + dense(c.width, name="o")(mixed)

        x = norm(name="mlp_norm")(hidden)
        gated = jax.nn.silu(dense(c.ffn, name="gate")(x)) * dense(c.ffn, name="up")(x)
        return hidden + dense(c.width, name="down")(gated)


class Model(Decoder):
    """A Llama of any size."""

    def block(self) -> nn.Module:
        return Block(self.config, self.dtype, parent=None)

    def norm(self) -> nn.Module:
        return nn.RMSNorm(self.config.norm_eps, dtype=self.dtype, param_dtype=self.dtype)


def rotate(x: Float[Array, "B S H C"], angles: Float[Array, "B S C/2"]) -> Float[Array, "B S H C"]:
    """Turns each pair (x[i], x[i + C/2]) by angles[i]; in float32, returned in x's dtype."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def config_from_hf(hf: Any) -> Config:
    """Sizes from a transformers LlamaConfig. Raises UserError for a variant that is not Llama's."""
    if hf.hidden_act not in ("silu", "swish") or hf.attention_bias or hf.mlp_bias:
        raise UserError(
            "Llama with biases or an activation other than silu is not supported: convert the "
            "model to a plain Llama"
        )
    return Config(
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_width=hf.head_dim,
        ffn=hf.intermediate_size,
        vocab=hf.vocab_size,
        max_context=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        frequencies=_hf_frequencies(hf.head_dim, hf.rope_parameters),
        tied=hf.tie_word_embeddings,
    )


def _frequencies(head_width: int, theta: float) -> np.ndarray:
    """theta^(-2i/C) for i < C/2, float64. Raises UserError if C is odd or absurd."""
    if head_width % 2 or not 0 < head_width <= MAX_HEAD_WIDTH:
        raise UserError(
            f"heads of {head_width} numbers: rotary positions need an even number up to "
            f"{MAX_HEAD_WIDTH}; the model's file is damaged, or of another kind"
        )
    return theta ** -(np.arange(0, head_width, 2) / head_width)


def _hf_frequencies(head_width: int, rope: Mapping[str, Any]) -> tuple[float, ...]:
    base = _frequencies(head_width, rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("Llama with a partial_rotary_factor is not supported: use another model")
    if kind == "linear":
        base = base / rope["factor"]
    elif kind == "llama3":
        base = _llama3_frequencies(base, rope)
    elif kind != "default":
        raise UserError(
            f"RoPE scaling '{kind}' is not supported: only default, linear and llama3"
        )
    return tuple(base.tolist())


def _llama3_frequencies(base: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Wavelengths over original / low are stretched by factor, those under original / high kept.

    Between the two the frequency is blended, linearly in the turns made over the original context.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * base + (1 - kept) * base / rope["factor"]


def hf_tensors(config: Config) -> dict[str, Stored]:
    """Names in a Hugging Face checkpoint, whose matrices are [out, in]."""
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    return {
        "embedding": Stored("embed_tokens.weight"),
        "unembedding": Stored("lm_head.weight"),
        "final_norm/scale": Stored("norm.weight"),
        "blocks/attn_norm/scale": Stored("layers.{}.input_layernorm.weight"),
        "blocks/mlp_norm/scale": Stored("layers.{}.post_attention_layernorm.weight"),
        **{
            f"blocks/{ours}/kernel": Stored(f"layers.{{}}.{name}.weight", transpose)
            for ours, name in names.items()
        },
    }


def config_from_gguf(file: GGUF) -> Config:
    """Sizes from the header of a GGUF file. Raises UserError for a missing key or RoPE scaling."""
    metadata = file.metadata
    width = field(metadata, "llama.embedding_length", int)
    heads = field(metadata, "llama.attention.head_count", int)
    scaling = field(metadata, "llama.rope.scaling.type", str, "none")
    if scaling != "none":
        raise UserError(f"RoPE scaling '{scaling}' in GGUF is not supported: use another model")
    if "llama.expert_count" in metadata:
        raise UserError("a mixture-of-experts GGUF model is not supported: use a dense Llama")
    head_width = field(metadata, "llama.attention.key_length", int, width // max(heads, 1))
    if field(metadata, "llama.rope.dimension_count", int, head_width) != head_width:
        raise UserError("a GGUF Llama with partial rotary positions is not supported")
    theta = field(metadata, "llama.rope.freq_base", float, 10_000.0)
    frequencies = _frequencies(head_width, theta)
    if "rope_freqs.weight" in file.tensors:  # how llama3 scaling is stored: C/2 divisors
        divisors = file.read("rope_freqs.weight")
        if divisors.shape != frequencies.shape:
            shapes = f"{divisors.shape}, not {frequencies.shape}"
            raise UserError(f"tensor 'rope_freqs.weight' has shape {shapes}")
        frequencies = frequencies / divisors
    return Config(
        width=width,
        layers=field(metadata, "llama.block_count", int),
        heads=heads,
        kv_heads=field(metadata, "llama.attention.head_count_kv", int, heads),
        head_width=head_width,
        ffn=field(metadata, "llama.feed_forward_length", int),
        vocab=file.rows("token_embd.weight"),
        max_context=field(metadata, "llama.context_length", int),
        norm_eps=field(metadata, "llama.attention.layer_norm_rms_epsilon", float),
        frequencies=tuple(frequencies.tolist()),
        tied="output.weight" not in file.tensors,
    )


def gguf_tensors(config: Config) -> dict[str, Stored]:
    """Names in a GGUF file, whose matrices are [out, in], rows of q and k interleaved."""
    names = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }

    def turn(ours: str, w: np.ndarray) -> np.ndarray:
        return transpose(_halves(w, config.head_width) if ours in ("q", "k") else w)

    return {
        "embedding": Stored("token_embd.weight"),
        "unembedding": Stored("output.weight"),
        "final_norm/scale": Stored("output_norm.weight"),
        "blocks/attn_norm/scale": Stored("blk.{}.attn_norm.weight"),
        "blocks/mlp_norm/scale": Stored("blk.{}.ffn_norm.weight"),
        **{
            f"blocks/{ours}/kernel": Stored(f"blk.{{}}.{name}.weight", partial(turn, ours))
            for ours, name in names.items()
        },
    }


def _halves(w: np.ndarray, head_width: int) -> np.ndarray:
    """Rows of each head from pairs (0, 1), (2, 3), ... to pairs (i, i + C/2); w [heads * C, D]."""
    if w.shape[0] % head_width:
        return w
    pairs = w.reshape(-1, head_width // 2, 2, w.shape[1])
    return pairs.swapaxes(1, 2).reshape(w.shape)
