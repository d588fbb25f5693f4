"""Agreement with the public implementation on `objective_cases.json`, one test for the file."""

import json

import pytest
import torch

from kvpo.method.advantage import anchor_relative, fuse_signals, std_scaled, zscored
from kvpo.method.objective import clipped_surrogate, policy_ratio, simplex_kl

AGREEMENT = {"rtol": 1e-5, "atol": 1e-5}
SCALING = {"none": lambda signal: signal, "std": std_scaled, "zscore": zscored}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check_objective(case: dict) -> None:
    scores = tensor(case["log_pi_theta"]).requires_grad_()
    theta = torch.log_softmax(scores, 0)
    old, initial = (torch.log_softmax(tensor(case[name]), 0) for name in ("log_pi_old", "log_pi_initial"))
    low, high = case["clip"]
    policy = clipped_surrogate(theta, old, tensor(case["adv"]), 1 - low, high - 1)
    kl = simplex_kl(theta, initial if case["kl_initial"] else old)
    total = policy + case["kl_coef"] * kl
    (gradient,) = torch.autograd.grad(total, scores)
    ratio = policy_ratio(theta, old)

    expected = case["ev"]
    torch.testing.assert_close(total, tensor(expected["total_loss"]), **AGREEMENT)
    torch.testing.assert_close(policy, tensor(expected["loss_grpo_item"]), **AGREEMENT)
    torch.testing.assert_close(kl, tensor(expected["loss_kl_term"]), **AGREEMENT)
    torch.testing.assert_close(ratio, tensor(expected["ratio"]), **AGREEMENT)
    clipped = ((ratio < low) | (ratio > high)).double().mean()
    torch.testing.assert_close(clipped, tensor(expected["clip_fraction"]), **AGREEMENT)
    torch.testing.assert_close(gradient, tensor(case["grad"]), **AGREEMENT)


def check_advantage(case: dict) -> None:
    signals = {}
    for name, rewards in (("adv_local", case["local"]), ("adv_global", case["glob"])):
        signals[name] = anchor_relative(tensor(rewards[0]), tensor(rewards[1]), 0.0)
        torch.testing.assert_close(signals[name], tensor(case[name]), **AGREEMENT)
    scale = SCALING[case["mode"]]
    fused = fuse_signals(scale(signals["adv_local"]), scale(signals["adv_global"]), 0.5)
    torch.testing.assert_close(fused, tensor(case["fused"]), **AGREEMENT)


def test_golden_objective_cases(golden_dir):
    path = golden_dir / "objective_cases.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {golden_dir}")
    cases = json.loads(path.read_text())
    assert cases["objective"] and cases["advantage"]
    for case in cases["objective"]:
        check_objective(case)
    for case in cases["advantage"]:
        check_advantage(case)
