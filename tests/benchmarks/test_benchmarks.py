"""The benchmarks measure what they say: arms compute the same, floors are counted right, all of it runs."""

import importlib
import json
import queue
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import with_shape
from kvpo.app.presets import demo
from kvpo.engine.generator import TextRows
from kvpo.models.adapters import add_adapter
from kvpo.models.cache import FrameCache, PageShape
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.context import PageContext
from kvpo.plan import flops
from tests.tiny_world import SETTINGS

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = WanShape(
    dim=24, num_heads=2, num_layers=3, ffn_dim=40, freq_dim=16, text_len=6, text_dim=10, channels=4,
    patch_size=(1, 2, 2), latent_height=4, latent_width=6,
)  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
def test_operations_are_those_that_torch_counts(adapted):
    rows, block, context = 2, 3, 5
    model = CausalWan(SHAPE).requires_grad_(False)
    if adapted:
        add_adapter(model, 2, 2, generator=torch.Generator().manual_seed(0))
    cache = FrameCache(PageShape(3, 6, 2, 12), context)
    pages = torch.arange(context).expand(rows, -1)
    seen = PageContext(cache, pages, torch.full((rows,), context))
    text = TextRows(torch.randn(1, SHAPE.text_len, SHAPE.text_dim), torch.zeros(rows, dtype=torch.int64))
    call = flops.Call(SHAPE, rows, block, context)
    extra = flops.summing_flops(SHAPE, 2) if adapted else 0
    expected = {False: flops.velocity_flops(call) + extra}
    if not adapted:  # an adapter's share of a clean pass is a bound: its last layer is computed in part only
        expected[True] = flops.encode_flops(call)
    for encode, operations in expected.items():
        counter = FlopCounterMode(display=False)  # it does not know oneDNN's products
        own = torch.backends.mkldnn.flags(enabled=False)
        with own, counter as counted, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(
                torch.randn(rows, block, 4, 4, 6),
                torch.full((rows,), 0.5),
                text.embeddings_ULD,
                seen,
                text_rows=text.rows_R,
                encode=encode,
            )
        assert counted.get_total_flops() == operations


def small(**exploration):
    """The demo's settings around a transformer of a few thousand parameters."""
    config = demo()
    config = with_shape(config, dim=32, num_heads=2, num_layers=2, ffn_dim=48)
    changed = replace(config.exploration, branches=2, tail_blocks=1, **exploration)
    return replace(config, exploration=changed)


def test_copied_caches_and_shared_pages_compute_the_same():
    import engine

    subject = engine.bench(small(blocks=2), groups=2)
    with engine.roots_of(subject) as rollout:
        engine.arms_of(subject, rollout)  # stops the benchmark where the arms differ
        cache = rollout.cache
    assert cache.pages_in_use == 0


def test_arms_that_differ_stop_the_benchmark():
    import engine

    value = torch.tensor([1.0, 2.0])
    assert engine.agree("values", value, value + 1e-6) < 1e-5
    with pytest.raises(SystemExit, match="disagree in values"):
        engine.agree("values", value, value + 1e-3)
    with pytest.raises(SystemExit, match="disagree in values"):
        engine.agree("values", value, value * float("nan"))


def test_shared_pages_hold_less_than_copies():
    import engine

    held = engine.memory(small(blocks=1), groups=1)
    shared = held["shared pages in use, all branches at once"]
    assert shared < held["copied caches, all branches at once"]
    assert shared <= held["shared pages preallocated"]


def test_pages_in_use_do_not_grow_with_the_length_of_the_video():
    import engine

    config = small(resident_frames=15)
    lengths = [engine.streamed(config, frames, 1) for frames in (48, 96)]
    assert lengths[0]["peak_pages"] == lengths[1]["peak_pages"]
    assert lengths[0]["pages_after"] == lengths[1]["pages_after"] == 15


def test_the_gpu_benchmark_runs_with_tiny_sizes_on_the_cpu(tmp_path, capsys):
    import gpu

    gpu.main(["--tiny", "--repeats", "1", "--rows", "2", "--json", str(tmp_path / "gpu.json")])
    numbers = json.loads((tmp_path / "gpu.json").read_text())
    sections = [row["section"] for row in numbers["rows"]]
    assert [name.split(",")[0].split(" (")[0] for name in sections] == [
        "one streamed block", "root up to the fork", "rollout", "replay and backward",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["arithmetic (s)"] > 0 for row in numbers["rows"])
    assert "| over the limit |" in capsys.readouterr().out


def test_structure_counts_kernels_and_the_bytes_that_they_move():
    import structure

    x = torch.ones(4, 8)
    found = structure.counted(lambda: (x.t() @ x).view(64).clone(), 1)
    assert found["operations per layer and call"] == 2 and found["copies per layer and call"] == 1
    assert found["GB read and written"] == pytest.approx(4 * (32 + 32 + 64 + 64 + 64) / 1e9)
    assert found["TFLOP of matrix products"] == pytest.approx(2 * 4 * 64 / 1e12)


def test_a_block_and_a_replay_are_counted_without_computing_them():
    import structure

    found = structure.structure(small())
    assert list(found) == ["streamed block", "replay, no gradient", "replay and backward"]
    operations = [one["operations per layer and call"] for one in found.values()]
    assert 0 < operations[0] < operations[2] and 0 < operations[1] < operations[2]


@pytest.mark.slow
def test_a_compiled_layer_has_no_more_graphs_than_windows_have_sizes():
    import structure

    found = structure.graphs(structure.BLOCKS)
    assert found["blocks"] == 40 and 0 < found["graphs"] <= found["window sizes"]


@pytest.mark.slow
def test_a_build_computes_what_itself_computes(tmp_path, capsys):
    import builds

    path = tmp_path / "builds.json"
    builds.main([str(SCRIPTS.parent), "--quick", "--rounds", "1", "--json", str(path)])
    numbers = json.loads(path.read_text())
    assert numbers["differences"] == {"latents": 0, "energies": 0, "gradients": 0}
    assert set(numbers["cpu_seconds"]) == {"rollout", "replay and backward"}
    assert all(len(times) == 1 for phase in numbers["cpu_seconds"].values() for times in phase.values())
    assert "latents 0.0e+00" in capsys.readouterr().out


def test_differences_of_builds_are_relative_to_what_is_computed(tmp_path):
    import builds

    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save({"latents": torch.tensor([1.0, -4.0])}, one)
    torch.save({"latents": torch.tensor([2.0, -4.0])}, other)
    assert builds.largest_differences(one, other) == {"latents": 0.25}


@pytest.mark.parametrize("name", ["gpu", "gpu_plan", "gpu_rewards"])
def test_without_a_gpu_nothing_is_measured(name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    importlib.import_module(name).main([])
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plan_is_compared_with_every_phase_of_a_tiny_run(tmp_path):
    import gpu_plan

    gpu_plan.main(["--tiny", "--json", str(tmp_path / "plan.json")])
    phases = json.loads((tmp_path / "plan.json").read_text())["phases"]
    assert [row["phase"] for row in phases] == list(gpu_plan.PHASES)
    assert all(row["planned GB"] > 0 and row["measured s"] > 0 for row in phases)


@pytest.mark.slow
def test_the_large_rewards_score_alike_in_both_processes(tmp_path, monkeypatch):
    import gpu_rewards

    monkeypatch.setenv(gpu_rewards.TINY, "1")
    options = ["--tiny", "--clips", "2", "--frames", "4", "--repeats", "1", "--rewards", "videoalign"]
    gpu_rewards.main([*options, "--json", str(tmp_path / "rewards.json")])
    (row,) = json.loads((tmp_path / "rewards.json").read_text())["rows"]
    assert row["difference of scores"] == 0 and row["s per clip, server"] > 0


@pytest.mark.slow
def test_the_engine_benchmark_runs(tmp_path, capsys):
    import engine

    engine.main(["--quick", "--threads", "1", "--json", str(tmp_path / "engine.json")])
    numbers = json.loads((tmp_path / "engine.json").read_text())
    assert len(numbers["comparison"]) == 4
    assert capsys.readouterr().out.count("## ") == 5


@pytest.mark.slow
def test_the_reward_service_benchmark_runs(tmp_path, capsys):
    import reward_service

    reward_service.main(["--quick", "--json", str(tmp_path / "service.json")])
    numbers = json.loads((tmp_path / "service.json").read_text())
    assert 0 < numbers["overlap"][0]["scoring (s)"] < numbers["overlap"][0]["in turn (s)"]
    assert "| slower by |" in capsys.readouterr().out


@pytest.mark.slow
def test_threads_beside_a_busy_process(tiny_words, tmp_path, capsys):
    threads = importlib.import_module("threads")
    words = [*tiny_words, "--stream.schedule", "[1.0, 0.5]", "--optim.updates", "9"]
    out = tmp_path / "threads.json"
    arms = ["--busy", "0", "1", "--threads", "1", "2", "--waiting", "PASSIVE"]
    threads.main(["--updates", "1", "--repeats", "1", *arms, "--json", str(out), *words])
    found = json.loads(out.read_text())
    assert [(r["busy"], r["threads"]) for r in found["results"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(0 < r["cpu_s"] and 0 < r["wall_s"] for r in found["results"])
    assert found["latents_apart"]["1"] == 0 and found["latents_apart"]["2"] < 1e-4
    assert "| 1 | 2 | PASSIVE |" in capsys.readouterr().out


def test_scaling_measures_updates_of_a_rank(tiny_base, monkeypatch, capsys):
    """The command on a tiny generator, its only process a thread of this one; then nothing is sent."""
    import scaling

    small = scaling.SMALL | SETTINGS | {"backbone.checkpoint": str(tiny_base)}
    monkeypatch.setattr(scaling, "SMALL", small)
    monkeypatch.setattr(scaling, "GROUPS", 1)
    here = SimpleNamespace(Process=threading.Thread, SimpleQueue=queue.SimpleQueue)
    monkeypatch.setattr(scaling.processes, "get_context", lambda kind: here)
    scaling.main(["--ranks", "1", "--updates", "1", "--only", "measured"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["| strong", "1", "1"],
        ["| weak", "1", "2"],
        ["| branches", "1", "1"],
    ]
    assert all(float(row[3]) > 0 and row[4:6] == ["1.00", "1.00"] and row[6] == "0.00" for row in rows)


def test_a_layout_of_512_ranks_holds_what_the_plan_says() -> None:
    from benchmarks.scaling import layout

    found = layout(ranks=512, size=8, lora_rank=8)
    assert found["teams"] == 64 and found["deepest_turns"] == 1
    assert found["weights"] == pytest.approx(found["planned_weights"], rel=0.01)
    assert found["adapter"] == pytest.approx(found["planned_adapter"], rel=0.01)


def test_more_cards_are_never_slower_and_say_when_they_idle() -> None:
    from benchmarks.scaling import model, model_table

    rows = [row for row in model(8) if row["preset"] == "longlive-1.3b"]
    assert [row["ranks"] for row in rows] == [1, 8, 16, 64, 512]
    seconds = [row["seconds_per_update"] for row in rows]
    assert seconds[1] < seconds[0] / 6 and seconds[-1] <= 1.05 * seconds[-2]
    assert rows[1]["busy"] == 1 and model_table(rows).count("longlive") == 5
