"""All methods by the name that ``--method`` takes.

To add one, write its file, and add a line here and its name and settings to ``Config``.
"""

from typing import Any

from kvpo.method import cm_grpo, flow_grpo, kvpo, latent_distance, nft, rvm, self_distill
from kvpo.method.evidence import Method

METHODS: dict[str, Method[Any]] = {
    "kvpo": kvpo.METHOD,
    "latent-distance": latent_distance.METHOD,
    "flow-grpo": flow_grpo.METHOD,
    "cm-grpo": cm_grpo.METHOD,
    "nft": nft.METHOD,
    "rvm": rvm.METHOD,
    "self-distill": self_distill.METHOD,
}
