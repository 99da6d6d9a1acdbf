"""Many-expert autoencoders in SAELens: importing this module registers `scale_moe` there.

    import scale_sae_jax.interop.sae_lens_plugin
    sae = sae_lens.SAE.load_from_disk(FOLDER)       # or SAE.from_pretrained(REPO, SAE_ID)

needs `pip install ".[sae_lens]"`. All experts are computed and masked, as SAELens' tools expect
codes for the whole dictionary. The formulas are those of `scale_sae_jax.sae.scale`.
"""

from dataclasses import dataclass, field
from typing import Any

import sae_lens
import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from torch import Tensor, nn


@dataclass
class ScaleMoESAEConfig(SAEConfig):
    """Options as in `scale_sae_jax.config.SAEConfig`; `balanced`: whether there is a balance."""

    metadata: Any = field(default_factory=SAEMetadata)  # a dict while SAELens reads it
    n_experts: int = 1
    active: int = 1
    k: int = 1
    gate: str = "prob"
    gate_at: str = "output"
    topk_scope: str = "token"
    balanced: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "scale_moe"


class ScaleMoESAE(SAE[ScaleMoESAEConfig]):
    """Parameters: W_enc [D, L], b_enc [L], W_dec [L, D], b_dec [D], W_router [D, N],
    b_router_in [D], b_router_out [N], and balance [N] and threshold [] where options have them.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))

        c = self.cfg
        self.b_enc = zeros(c.d_sae)
        self.W_router = zeros(c.d_in, c.n_experts)
        self.b_router_in, self.b_router_out = zeros(c.d_in), zeros(c.n_experts)
        if c.balanced:
            self.balance = zeros(c.n_experts)
        if c.topk_scope == "batch":
            self.threshold = zeros()

    def weights(self, x: Float[Tensor, "*T D"]) -> tuple[Tensor, Tensor]:
        """(weight of each expert, whether it is selected), both [*T, N]."""
        logits = (x - self.b_router_in) @ self.W_router + self.b_router_out
        probs = logits.softmax(-1)
        order = logits + self.balance if self.cfg.balanced else logits
        chosen = order.topk(self.cfg.active, dim=-1).indices
        selected = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, chosen, True)
        kind = self.cfg.gate
        if kind == "prob":
            return probs, selected
        if kind == "renorm":
            return probs / torch.where(selected, probs, 0).sum(-1, keepdim=True), selected
        if kind == "softmax_probs":
            return probs.masked_fill(~selected, -torch.inf).softmax(-1), selected
        if kind == "softmax_logits":
            return logits.masked_fill(~selected, -torch.inf).softmax(-1), selected
        if kind == "one":
            return torch.ones_like(probs), selected
        raise ValueError(f"unknown gate {kind!r}")

    def survivors(self, acts: Float[Tensor, "*T N m"]) -> Float[Tensor, "*T N m"]:
        """Latents that win a slot, the rest 0."""
        c = self.cfg
        if c.topk_scope == "batch":
            return torch.where(acts > self.threshold, acts, 0)
        if c.topk_scope == "expert":
            return _largest(acts, c.k // c.active)
        if c.topk_scope == "token":
            return _largest(acts.flatten(-2), c.k).view_as(acts)
        raise ValueError(f"unknown topk_scope {c.topk_scope!r}")

    def encode(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T L"]:
        """Codes, gates included: what multiplies the decoder's rows."""
        centred = self.process_sae_in(x)
        weights, selected = self.weights(x.to(self.dtype))
        pre = self.hook_sae_acts_pre(centred @ self.W_enc + self.b_enc)
        acts = self.activation_fn(pre).unflatten(-1, (self.cfg.n_experts, -1))
        acts = torch.where(selected.unsqueeze(-1), acts, 0)
        if self.cfg.gate_at == "code":
            codes = self.survivors(acts * weights.unsqueeze(-1))
        else:
            codes = self.survivors(acts) * weights.unsqueeze(-1)
        return self.hook_sae_acts_post(codes.flatten(-2))

    def decode(self, feature_acts: Float[Tensor, "*T L"]) -> Float[Tensor, "*T D"]:
        return self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)

    def fold_W_dec_norm(self) -> None:
        """Does nothing where decoder rows have norm 1, and is refused elsewhere."""
        if not torch.allclose(self.get_W_dec_norm(), torch.ones(()), atol=1e-5):
            raise NotImplementedError(
                "decoder norms cannot be folded into scale_moe: latents would compete for slots "
                "in another order"
            )


def _largest(values: Float[Tensor, "*T W"], k: int) -> Float[Tensor, "*T W"]:
    top = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)


sae_lens.register_sae_class("scale_moe", ScaleMoESAE, ScaleMoESAEConfig)
