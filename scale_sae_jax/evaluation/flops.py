"""The bill of a forward pass: floating-point operations a token, counted, not profiled."""

from typing import NamedTuple


class Flops(NamedTuple):
    """Floating-point operations a token; a multiply-add counts as two."""

    encoder: int
    router: int
    decoder: int

    @property
    def total(self) -> int:
        return self.encoder + self.router + self.decoder


def forward_flops(
    width: int,
    latents: int,
    experts: int,
    active: int,
    k: int,
    *,
    sparse_decoder: bool = True,
) -> Flops:
    """Forward cost of one token through a routed autoencoder; one expert means no router.

    Args:
      width: model width d.
      latents: dictionary width L over all experts.
      experts: number of experts N; a plain autoencoder has 1.
      active: experts e selected for a token.
      k: latents a token may use (L0).
      sparse_decoder: True if the decoder touches only the k used rows, False if it multiplies
        all latents of the selected experts.
    """
    active_width = active * (latents // experts)
    return Flops(
        encoder=2 * width * active_width,
        router=2 * width * experts if experts > 1 else 0,
        decoder=2 * width * (k if sparse_decoder else active_width),
    )
