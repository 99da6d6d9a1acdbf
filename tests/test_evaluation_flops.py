"""FLOPs of the published sizes, worked out by hand."""

import pytest

from scale_sae_jax.evaluation.flops import Flops, forward_flops

CASES = [
    # d = 768, M = 24,576, 64 experts, 2 active, k = 32: 768 active latents.
    ((768, 24_576, 64, 2, 32, True), Flops(1_179_648, 98_304, 49_152)),
    ((768, 24_576, 64, 2, 32, False), Flops(1_179_648, 98_304, 1_179_648)),
    # 16 experts, 2 active: 3,072 active latents.
    ((768, 24_576, 16, 2, 32, True), Flops(4_718_592, 24_576, 49_152)),
    # Plain TopK of width 768: no router.
    ((768, 768, 1, 1, 32, True), Flops(1_179_648, 0, 49_152)),
]


@pytest.mark.parametrize(("arguments", "expected"), CASES)
def test_published_sizes(arguments, expected):
    *sizes, sparse = arguments
    flops = forward_flops(*sizes, sparse_decoder=sparse)
    assert flops == expected
    assert flops.total == sum(expected)
