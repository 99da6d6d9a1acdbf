"""What a training step will need of each device, by formulas: bytes, traffic, arithmetic.

docs/scaling.md derives them. Parameters are counted, traffic is that of the arrays that travel;
what XLA allots for temporaries is fitted to its CPU compiler, for many experts
(`python -m benchmarks.scaling` holds the plan against it).
"""

from dataclasses import dataclass

import jax

from scale_sae_jax.config import OptimConfig, SAEConfig
from scale_sae_jax.sae.registry import build
from scale_sae_jax.sae.shards import DATA, EXPERT

FLOAT = 4
# Arrays of the forward and backward pass that are in memory together, for each token of a row of
# devices: [e, m] latents and their gradients, [e, D] products of the decoder, [D] activations and
# residuals, [e, k] candidates. With AuxK (whose branch XLA reserves, taken or not) there are more.
PASSES = {False: (2.5, 1.4, 2.1, 8.2), True: (3.9, 2.9, 7.1, 11.7)}


@dataclass(frozen=True)
class Plan:
    """Of one device: bytes by what they hold, bytes that it receives a step by why, and FLOPs.

    flops: useful ones of a step, 10 e m d a token and those of the router.
    """

    memory: dict[str, int]
    traffic: dict[str, int]
    flops: float

    @property
    def bytes(self) -> int:
        """All memory."""
        return sum(self.memory.values())

    @property
    def received(self) -> int:
        """All traffic of a step."""
        return sum(self.traffic.values())


def plan(
    config: SAEConfig,
    optim: OptimConfig,
    width: int,
    batch: int,
    batches: int,
    mesh: dict[str, int],
) -> Plan:
    """The needs of a many-expert autoencoder, or of one dictionary (one expert).

    Args:
      width: D.
      batch: T, activations a step over all devices.
      batches: batches in memory: steps a call, twice where the next ones are read ahead.
      mesh: sizes of the axes 'data' and 'expert'.
    """
    data, expert = mesh[DATA], mesh[EXPERT]
    devices, row = data * expert, batch // data
    e, k, n, d = config.active, config.k, config.experts, width
    m = config.latents // n
    sae = build(config, width)
    params = jax.eval_shape(sae.init, jax.random.key(0))
    split = {name: expert if name in sae.module.by_expert else 1 for name in params}
    sizes = {name: leaf.size // split[name] for name, leaf in params.items()}
    matrices = sum(sizes[name] for name, leaf in params.items() if leaf.ndim > 1)  # see precision
    small = sum(sizes.values()) - matrices
    shared = sum(sizes[name] for name in params if name not in sae.module.by_expert)
    of_experts = sum(sizes.values()) - shared
    kept, moments = _size(optim.param_dtype), 2 * _size(optim.moment_dtype)
    aux = min(config.auxk_latents or d // 2, e * m) if config.auxk else 0

    a_token = (e * m, e * d, d, e * k)
    arrays = sum(count * size for count, size in zip(PASSES[aux > 0], a_token, strict=True))
    passes = int(FLOAT * row * arrays)
    gradient = FLOAT * (matrices + small)
    narrow = FLOAT * matrices if kept < FLOAT or moments < 2 * FLOAT else 0
    temporary = 2 * gradient + passes if aux else max(2 * gradient, gradient + passes)
    memory = {
        "parameters": kept * matrices + FLOAT * small,
        "moments": moments * matrices + 2 * FLOAT * small,
        "counters": FLOAT * n * m // expert,
        "batches": FLOAT * batches * batch * d // devices,
        "gradients and updates": min(temporary, 2 * gradient) + 4 * narrow,
        "forward and backward": max(0, temporary - 2 * gradient),
    }
    across = FLOAT * row * (expert - 1) / expert  # bytes of one number a token, along `expert`
    candidates = 2 * e * min(k, m) + k if config.topk_scope == "token" else 0
    revived = 2 * e * min(aux, m) + aux + 2 * d if aux else 0
    over_data, over_all = 2 * (data - 1) / data, 2 * (devices - 1) / devices
    traffic = {
        "tokens to experts": int(across * (d + 3 * e)),
        "candidates and winners": int(across * candidates),
        "decoded and residuals": int(across * 2 * d),
        "AuxK, where latents are dead": int(across * revived),
        "gradients of experts": int(FLOAT * over_data * (of_experts + n * m // expert)),
        "gradients of the rest": int(FLOAT * over_all * shared),
    }
    flops = batch * (10 * e * m * d + 6 * d * n) / devices
    return Plan(memory, traffic, flops)


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else FLOAT
