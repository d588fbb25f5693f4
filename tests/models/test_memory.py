"""What loading a checkpoint costs in memory, measured in a process of its own on a file of 400 MB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvpo.models.causal_wan import CausalWan, WanShape

SHAPE = WanShape(
    dim=1024, num_heads=8, num_layers=6, ffn_dim=4096, freq_dim=16, text_len=8, text_dim=64, channels=4,
    patch_size=(1, 2, 2), latent_height=4, latent_width=4,
)  # fmt: skip

LOAD = """
import json, resource, sys
from pathlib import Path
import torch
from kvpo.models.causal_wan import CausalWan
from kvpo.models.checkpoints import assign_state, load_transformer_state
from tests.models.test_memory import SHAPE

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

with torch.device("meta"):
    model = CausalWan(SHAPE)
own, peak = anonymous(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
state = load_transformer_state(sys.argv[1])
assign_state(model, state, device="cpu", dtype=getattr(torch, sys.argv[2]))
for value in model.parameters():  # every page is looked at
    value.flatten()[:: 512].sum()
print(json.dumps([anonymous() - own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]


@pytest.mark.parametrize(
    ("layout", "dtype", "own", "peak"),
    [
        ("pt", "float32", 0.05, 1.1),  # the mapped file is the weights
        ("pt", "bfloat16", 0.55, 1.6),  # the cast weights, beside the file's pages that the kernel may drop
        ("safetensors", "float32", 1.05, 2.1),  # unaligned tensors are copied, one by one
        ("safetensors", "bfloat16", 0.55, 1.6),
    ],
)
def test_no_second_copy_of_a_checkpoint(
    tmp_path: Path, layout: str, dtype: str, own: float, peak: float
) -> None:
    state = {name: torch.full(value.shape, 0.5) for name, value in CausalWan(SHAPE).state_dict().items()}
    size = sum(value.nbytes for value in state.values())
    assert size > 300e6
    path = tmp_path / f"base.{layout}"
    if layout == "pt":
        torch.save({"generator": {f"model.{name}": value for name, value in state.items()}}, path)
    else:
        save_file(state, path)
    del state
    command = [sys.executable, "-c", LOAD, str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    anonymous, highest = json.loads(done.stdout.splitlines()[-1])
    assert anonymous <= own * size and highest <= peak * size, (anonymous / size, highest / size)
