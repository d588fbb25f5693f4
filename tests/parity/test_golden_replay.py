"""Replay scores under the public trainer's conventions (the documented parity option)."""

import pytest
import torch

from tests.parity.fixtures import CONTEXT_NOISE, base_model, generator_of, load, of_kind
from tests.parity.runs import public_scores, replay_policies, run_replay

every_replay = pytest.mark.parametrize("path", of_kind("replay"), ids=lambda path: path.stem)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}


@every_replay
def test_golden_replay(path):
    meta, data = load(path)
    for name, scores in run_replay(meta, data, lambda: base_model(meta)).items():
        assert (scores - data[name].float()).abs().max() <= TOLERANCE[meta["dtype"]], name


@every_replay
def test_golden_replay_in_micro_batches(path):
    """A few branches at a time, the last batch a smaller one."""
    meta, data = load(path)
    rows = max(1, len(data["noisy_inputs"]) - 1)
    for name, scores in run_replay(meta, data, lambda: base_model(meta), rows=rows).items():
        assert (scores - data[name].float()).abs().max() <= TOLERANCE[meta["dtype"]], name


@every_replay
def test_golden_replay_with_activation_checkpointing(path):
    """The first two blocks: the same gradient, branch by branch and all at once, as without recomputation."""
    meta, data = load(path)
    branches, blocks = data["noisy_inputs"].shape[:2]
    if blocks < 2:
        pytest.skip(f"{path.name} replays one block, without a history of its own")
    noise = data["context_noise"].unflatten(0, (branches, blocks - 1))[:, :1]
    data |= {name: data[name][:, :2] for name in ("noisy_inputs", "clean_predictions")}
    data["context_noise"] = noise.flatten(0, 1)
    with torch.no_grad():
        model = replay_policies(data, lambda: base_model(meta))["theta"]
    parameters = list(model.blocks[0].requires_grad_().parameters())
    weights = torch.linspace(-1, 2, branches)

    def gradients(rows, checkpointing):
        model.checkpointing = checkpointing
        for parameter in parameters:
            parameter.grad = None
        public_scores(
            meta, data, generator_of(meta, model, CONTEXT_NOISE), rows=rows,
            scored=lambda batch, scores: (weights[batch] * scores).sum().backward(),
        )  # fmt: skip
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    expected = gradients(0, False)
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 1e-4
    for rows in (0, 1):
        for found, plain in zip(gradients(rows, True), expected, strict=True):
            assert (found - plain).abs().max() <= (1e-5 if meta["dtype"] == "float32" else 0.1) * largest
