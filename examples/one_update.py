"""One KVPO update, top to bottom: stream, fork, route, score, replay, loss, step.

    python examples/one_update.py

It runs on the embedded generator with the library's own functions, takes a few seconds on a CPU, and prints
the largest difference from the parameters that ``Trainer.step`` produces: 0.

Axes: M members of a fork (G branches, then the anchor), N rows of the table, P routed blocks, S solver steps,
F C H W one block of latents.
"""

import torch

import kvpo
from kvpo.app.build import build_setup
from kvpo.engine.explorers import Member, Site, routes
from kvpo.engine.forks import draw_forks
from kvpo.engine.noise import keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.replay import ReplayRow, replay_context, replay_velocities
from kvpo.engine.rollout import Rollout
from kvpo.engine.scoring import score_group
from kvpo.engine.stream import advance, open_stream, switch_prompts
from kvpo.method.evidence import Tables, anchor_drift, joined_evidence, residual_table
from kvpo.method.methods import METHODS
from kvpo.training.credit import assign_credit
from kvpo.training.policy import policy_of
from kvpo.training.setup import Setup
from kvpo.training.trainer import BETAS, GRADIENT_NORM, WEIGHT_DECAY, Trainer, learning_rate_factor

SETTINGS = {"optim.prompts_per_update": 1, "optim.updates": 1, "kvpo.simplex_kl": 0.1}
UPDATE = 0


def one_update(setup: Setup) -> dict[str, torch.Tensor]:
    """Train the setup's adapter for one update and return its tensors."""
    config, generator = setup.config, setup.generator
    policy = policy_of(setup.model)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()),
        lr=config.optim.lr * learning_rate_factor(UPDATE),
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )

    # Stream. Every block attends to the pages in the deployment window; noise is a fixed tape, never drawn.
    (prompt,) = setup.training_prompts(UPDATE)
    texts, tape, key = setup.backbone.texts([prompt]), setup.backbone.tape("training"), (config.seed, UPDATE)
    (fork,) = draw_forks([prompt], config.exploration, generator.deployment, key)
    planned = PlannedRollout([prompt], [fork], keep_pool=True)
    cache = generator.new_cache(cache_pages(generator, [planned]))  # with room for all routable pages
    root = open_stream(generator, cache, prompt, texts, tape)
    while root.start < fork.frame:
        advance(generator, [root], resident=config.exploration.resident_frames)
    switch_prompts(generator, [root])  # apply a prompt switch right at the fork before the branches start

    # Fork and route. Branches share all noise; each sees different old frames in its local slots. Nothing is
    # copied: a fork is a list of page numbers, a route a few of them. The last member is the unrouted anchor.
    members = [*routes(Site(generator, planned, tape, key), 0), Member(0)]
    rollout = Rollout(generator, planned, texts, tape, cache, {0: root})
    group = rollout.group_of(members, rollout.run(members))

    # Score. Rewards of the clips that can differ become advantages of the best and the worst branches.
    codec, scorer = setup.backbone.codec, setup.judges.scorer
    shown = config.rewards.transition_blocks
    scores = score_group(group, codec, scorer, block=generator.block, transition_blocks=shown)
    draws = keyed_generator("advantages", *key, 0)
    credit = assign_credit(scores, setup.blend(), draws)
    assert credit is not None, "these branches differ by noise alone"

    # Evidence. KVPO asks: at the states that a branch visited, how far is your velocity from the branch's?
    # One more row, at the anchor's states, asks how far it is from the starting policy's: the velocity KL.
    method, settings, trajectories = METHODS["kvpo"], config.method_settings, group.trajectories
    evidence = method.evidence(trajectories, credit, settings, keyed_generator("evidence", *key, 0))
    rows_of_method = len(evidence.query_N)
    evidence = joined_evidence(evidence, anchor_drift(trajectories, credit, evidence, settings))

    # Replay in the deployment context: each trajectory follows its own earlier blocks.
    rows = [
        ReplayRow(root, trajectories.clean_MPFCHW[past], states)
        for past, states in zip(evidence.past_Q, evidence.states_QPSFCHW, strict=True)
    ]
    window = range(fork.exploration.blocks)

    def table(velocities_QPSFCHW: torch.Tensor) -> torch.Tensor:
        """w mean || target - v ||^2 of every row, block and step, [N, P, S]."""
        asked = velocities_QPSFCHW[list(evidence.query_N)]
        return residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, asked)

    with policy.reference(), replay_context(generator, rows) as replay:
        velocities = replay_velocities(generator, rows, replay, window)
    evidence = evidence.with_teacher("reference", velocities[list(evidence.query_N)])
    reference = table(velocities)

    # Loss and step. Here everything fits in one backward pass; the trainer backpropagates the same table in
    # micro-batches. Nothing was learned since the rollout, so the old policy is the current one: ratio 1.
    with replay_context(generator, rows) as replay:
        now = table(replay_velocities(generator, rows, replay, window))
        own, old, starting = (part[:rows_of_method] for part in (now, now.detach(), reference))
        tables = Tables(own, old, starting, evidence.branch_N[:rows_of_method])
        loss, metrics = method.loss(tables, credit, settings)
        loss = loss + config.objective.velocity_kl * now[rows_of_method:].sum()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(list(policy.parameters.values()), GRADIENT_NORM)
    optimizer.step()
    rollout.release()
    print({name: round(value, 6) for name, value in metrics.items()})
    return {name: value.detach() for name, value in policy.parameters.items()}


def largest_difference() -> float:
    """Largest difference between the trained tensors after this update and after the trainer's."""
    config = kvpo.preset("demo", SETTINGS)
    ours = one_update(build_setup(config))
    trainer = Trainer(build_setup(config))
    trainer.step()
    theirs = trainer.policy.parameters
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name].detach()).abs().max()) for name in ours)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"largest difference to Trainer.step: {largest_difference():g}")
