"""Schedule tables, rotary embedding and timestep features against the public implementation's numbers."""

import pytest
import torch

from kvpo.method.flow import few_step_sigmas
from kvpo.models.causal_wan import TIMESTEPS, cos_sin, rotary_angles, rotate, timestep_sinusoid
from tests.parity.fixtures import SIGMAS, load, of_kind


def agrees(actual, expected, relative=1e-6):
    """Relative to each entry for the tables, to the largest entry where zeros are crossed."""
    return bool(((actual - expected).abs() <= relative * expected.abs()).all())


@pytest.mark.parametrize("path", of_kind("units"), ids=lambda path: path.stem)
def test_golden_units(path):
    meta, data = load(path)
    table = few_step_sigmas(torch.linspace(1, 0, 1001)[:-1].tolist(), 5.0)
    assert agrees(table, data["sigmas"].double())
    assert agrees(TIMESTEPS * table, data["timesteps"].double())
    warped = data["warped"].double()
    assert agrees(TIMESTEPS * few_step_sigmas((1.0, 0.75, 0.5, 0.25), 5.0), warped)
    assert agrees(TIMESTEPS * torch.tensor(SIGMAS, dtype=torch.float64), warped)

    sinusoid = timestep_sinusoid(data["sinusoid_t"], data["sinusoid_emb"].shape[1])
    exact = data["sinusoid_emb"].dtype == torch.float64
    assert (sinusoid - data["sinusoid_emb"]).abs().max() <= (1e-12 if exact else 1e-6)

    frames, rows, columns = meta["rope_grid"]
    positions = meta["rope_start_frame"] + torch.arange(frames)[None]
    rotation = cos_sin(rotary_angles(positions, (rows, columns), data["rope_q"].shape[-1]))
    rotated = rotate(data["rope_q"], rotation)
    assert (rotated - data["rope_out"]).abs().max() <= 1e-6 * data["rope_out"].abs().max()
