"""What every decoder-only model shares: stacked blocks, run in part.

The parameters of all blocks are stacked, [L, ...] each, and `lax.scan` runs over block indices:
only the blocks asked for are computed, and compile time does not grow with depth. On SmolLM2 (2 CPU
cores, 2048 tokens, float32) the scan takes as long as unrolled blocks within noise, as do fused
qkv and gate-up matrices; the matrix products alone take 80% of the time, near the machine's limit.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

_normal = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """Embedding, L blocks, final norm, unembedding; a family adds what is its own.

    config: the family's frozen dataclass, with width, layers, vocab, tied at least.
    dtype: of parameters and hidden states; norms, softmax and logits are float32 inside.
    """

    config: Any
    dtype: Any = jnp.float32

    def block(self) -> nn.Module:
        """One unbound block, called as block(hidden [B, S, D], segments [B, S])."""
        raise NotImplementedError

    def norm(self) -> nn.Module:
        """The norm before the unembedding."""
        raise NotImplementedError

    def embed(
        self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """The residual stream before block 0."""
        return self.embedding[tokens]

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", _normal, (c.vocab, c.width), self.dtype)
        self.blocks = self.param("blocks", self._init_blocks)
        self.final_norm = self.norm()
        if not c.tied:
            self.unembedding = self.param("unembedding", _normal, (c.vocab, c.width), self.dtype)

    def _init_blocks(self, key: Array) -> PyTree:
        block = self.block()
        hidden = jnp.zeros((1, 1, self.config.width), self.dtype)
        segments = jnp.ones((1, 1), jnp.int32)

        def init(key: Array) -> PyTree:
            return block.init(key, hidden, segments)["params"]

        return jax.vmap(init)(jax.random.split(key, self.config.layers))

    def _scan(self, hidden: Array, segments: Array, first: int, stop: int) -> Array:
        """The output [B, S, D] of block stop - 1, from the input of block `first`."""
        block, blocks = self.block(), self.blocks

        def step(hidden: Array, index: Array) -> tuple[Array, None]:
            params = jax.tree.map(lambda stacked: stacked[index], blocks)
            return block.apply({"params": params}, hidden, segments), None

        return jax.lax.scan(step, hidden, jnp.arange(first, stop))[0]

    def unembed(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Final norm and logits, float32."""
        table = self.embedding if self.config.tied else self.unembedding
        return jnp.einsum(
            "bsd,vd->bsv", self.final_norm(hidden), table, preferred_element_type=jnp.float32
        )

    def direct_logits(self, directions: Float[Array, "n D"]) -> Float[Array, "n V"]:
        """What residual directions add to the logits, up to the norm of the stream; float32.

        The unembedding of the direction times the final norm's gain; a LayerNorm also takes its
        mean away. The division by the stream's norm, one factor for all tokens, is left out, and so
        is the direction's own part in that norm.
        """
        if isinstance(self.final_norm, nn.LayerNorm):
            directions = directions - directions.mean(-1, keepdims=True)
        gain = self.final_norm.variables["params"]["scale"]
        table = self.embedding if self.config.tied else self.unembedding
        return jnp.einsum("nd,vd->nv", directions * gain, table, preferred_element_type=jnp.float32)

    def run_to(
        self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"], layer: int
    ) -> Float[Array, "B S D"]:
        """The output of block `layer`."""
        return self._scan(self.embed(tokens, segments), segments, 0, layer + 1)

    def run_from(
        self, hidden: Float[Array, "B S D"], segments: Int[Array, "B S"], layer: int
    ) -> Float[Array, "B S V"]:
        """Logits, float32, if `hidden` is the output of block `layer`."""
        hidden = hidden.astype(self.dtype)
        return self.unembed(self._scan(hidden, segments, layer + 1, self.config.layers))

    def __call__(
        self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S V"]:
        """Logits, float32."""
        return self.run_from(self.embed(tokens, segments), segments, -1)
