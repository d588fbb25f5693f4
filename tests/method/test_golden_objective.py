"""Agreement with the public implementation on `objective_cases.json`, one test for the file."""

import json

import torch

from kvpo.method.advantage import SMALLEST_SPREAD, centred, fuse_signals, group_relative
from kvpo.method.gibbs import clipped_surrogate, policy_ratio, simplex_kl

AGREEMENT = {"rtol": 1e-5, "atol": 1e-5}


def std_scaled(signal_G: torch.Tensor) -> torch.Tensor:
    """As in the public code: A / std(A), ddof 0, not centred. Undoes the noise floor."""
    return signal_G / signal_G.std(correction=0).clamp_min(SMALLEST_SPREAD)


SCALING = {
    "none": lambda signal: signal,
    "std": std_scaled,
    "zscore": lambda signal: std_scaled(centred(signal)),
}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def anchor_share(case: dict) -> float:
    """The public anchor probability, a constant: half of the pool if no branch beats the anchor."""
    return 0.0 if case["safe"] else 0.5


def check_objective(case: dict) -> None:
    """Terms, total and gradient; ``mechanism_1`` skips a group whose branches all lose to the anchor,
    ``mechanism_2`` scales it by the share that the anchor leaves."""
    assert case["mode"] in ("mechanism_1", "mechanism_2"), f"mode = {case['mode']!r} is not known"
    scores = tensor(case["log_pi_theta"]).requires_grad_()
    theta = torch.log_softmax(scores, 0)
    old = torch.log_softmax(tensor(case["log_pi_old"]), 0)
    reference = torch.log_softmax(tensor(case["log_pi_initial"]), 0) if case["kl_initial"] else old
    low, high = case["clip"]
    scale = 1 - anchor_share(case)
    if case["mode"] == "mechanism_1":
        scale = float(case["safe"])
    policy = scale * clipped_surrogate(theta, old, tensor(case["adv"]), (1 - low, high - 1))
    kl = simplex_kl(theta, reference)
    total = policy + scale * case["kl_coef"] * kl
    (gradient,) = torch.autograd.grad(total, scores)
    ratio = policy_ratio(theta, old)
    clipped = ((ratio < low) | (ratio > high)).double().mean()
    if not scale:
        clipped = torch.zeros_like(clipped)

    expected = case["ev"]
    computed = {"total_loss": total, "loss_grpo_item": policy, "loss_kl_term": kl, "ratio": ratio}
    for name, value in (computed | {"clip_fraction": clipped}).items():
        # Terms that the public code has not computed are empty.
        if expected[name] is not None:
            torch.testing.assert_close(value, tensor(expected[name]), **AGREEMENT, msg=name)
    expected_gradient = torch.zeros_like(gradient) if case["grad"] is None else tensor(case["grad"])
    torch.testing.assert_close(gradient, expected_gradient, **AGREEMENT)


def check_advantage(case: dict) -> None:
    signals = {}
    for name, rewards in (("adv_local", case["local"]), ("adv_global", case["glob"])):
        signals[name] = group_relative(tensor(rewards[0]), tensor(rewards[1]), 0.0)
        torch.testing.assert_close(signals[name], tensor(case[name]), **AGREEMENT)
    assert case["mode"] in SCALING, f"mode = {case['mode']!r} is not known"
    scale = SCALING[case["mode"]]
    fused = fuse_signals(scale(signals["adv_local"]), scale(signals["adv_global"]), 0.5)
    torch.testing.assert_close(fused, tensor(case["fused"]), **AGREEMENT)


def test_golden_objective_cases(golden_file):
    cases = json.loads(golden_file("objective_cases.json").read_text())
    assert any(cases.values()) and set(cases) <= {"objective", "advantage"}
    for case in cases.get("objective", ()):
        check_objective(case)
    for case in cases.get("advantage", ()):
        check_advantage(case)
