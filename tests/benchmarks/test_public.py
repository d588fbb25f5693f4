"""The comparison with the public trainer, as far as it goes without a checkout of that."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from kvpo.engine.explorers import RoutedFrame
from kvpo.models.adapters import base_state
from kvpo.models.causal_wan import WanShape
from kvpo.models.linear import AVAILABLE

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = WanShape(
    dim=24, num_heads=2, num_layers=2, ffn_dim=40, freq_dim=16, text_len=6, text_dim=10, channels=4,
    patch_size=(1, 2, 2), latent_height=4, latent_width=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def modules_of_a_checkout(benchmark_scripts):
    """A checkout's modules would stay loaded."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("models", "rewards"):
            del sys.modules[name]


def stand_in(folder, text=""):
    """A checkout whose files hold nothing but ``text``."""
    checkout = importlib.import_module("public_checkout")
    for name in (checkout.CONFIG, *(f"{one.replace('.', '/')}.py" for one in checkout.MODULES.values())):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name.endswith(".py") else "K: 8\n")
    return folder


def test_a_missing_or_wrong_checkout_is_refused_in_one_line(tmp_path, capsys):
    public = importlib.import_module("public")
    broken = stand_in(tmp_path / "broken", "import a_package_that_nobody_has\n")
    wrong = stand_in(tmp_path / "wrong")
    (wrong / "models/longlive/trainer/kvpo.py").unlink()
    for arguments, says in (
        ([], "--public: give the path of a checkout"),
        (["--public", str(tmp_path)], f"--public {tmp_path}: has no configs/train_kvpo_longlive.yaml"),
        (["--public", str(wrong)], f"--public {wrong}: has no models/longlive/trainer/kvpo.py"),
        (["--public", str(broken)], "do not import here: No module named 'a_package_that_nobody_has'"),
    ):
        with pytest.raises(SystemExit):
            public.main([*arguments, "--sizes", "tiny"])
        *usage, error = capsys.readouterr().err.splitlines()
        assert says in error and not any(says in line for line in usage)


def test_what_is_not_installed_is_stood_in_for_only_while_a_checkout_is_imported(tmp_path):
    checkout = importlib.import_module("public_checkout")
    checkout.ABSENT = ("a_package_that_nobody_has",)
    path = stand_in(tmp_path, "from a_package_that_nobody_has.part import anything\nONE = anything(a=1).a\n")
    modules = checkout.modules_of(path)
    assert modules["trainer.kvpo"].ONE == 1
    assert checkout.shipped(path) == {"K": 8}
    with pytest.raises(ImportError):
        importlib.import_module("a_package_that_nobody_has.other")


def test_the_public_modules_get_our_sizes_and_our_noise():
    checkout, public = (importlib.import_module(name) for name in ("public_checkout", "public"))
    tape = public.recorded_tape(SHAPE)
    sized = checkout.Sized(SHAPE, tape, 3)
    assert sized.zeros([1, 99, 12, 128]).shape == (1, 99, 2, 12)
    assert sized.zeros([1, 512, 12, 128], dtype=torch.float64).shape == (1, 6, 2, 12)
    assert sized.zeros(5).shape == (5,) and sized.ones is torch.ones
    sized.chunks = iter((21,))
    noise = sized.randn([1, 6, 16, 60, 104], device="cpu")
    assert torch.equal(noise[0], torch.cat([tape(0, 7, "initial"), tape(0, 8, "initial")]))
    sized.begin(21)
    drawn = [sized.randn(torch.Size((3, 4, 4, 4))) for _ in range(5)]
    asked = [(7, "renoise 1"), (7, "renoise 2"), (7, "renoise 3"), (7, "context"), (8, "renoise 1")]
    assert all(torch.equal(one, tape(0, *place)) for one, place in zip(drawn, asked, strict=True))


def test_the_public_transformer_gets_our_geometry_and_the_weights_below_the_adapter():
    checkout, public = (importlib.import_module(name) for name in ("public_checkout", "public"))

    class Model(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options
            self.own = public.transformer(SHAPE, 0)

        def load_state_dict(self, weights):
            self.own.load_state_dict(weights)

    adapted = public.transformer(SHAPE, 4)
    built = checkout._built(Model, SHAPE, base_state(adapted), "a directory", sink_size=3)
    geometry = {name: vars(SHAPE)[name] for name in ("dim", "ffn_dim", "num_heads", "text_dim", "patch_size")}
    assert built.options.items() >= (geometry | {"in_dim": 4, "out_dim": 4, "sink_size": 3}).items()
    for name, value in base_state(adapted).items():
        assert torch.equal(built.own.state_dict()[name], value)


def test_memory_that_tensors_share_counts_once():
    checkout, measuring = (importlib.import_module(name) for name in ("public_checkout", "measuring"))
    one, other = torch.zeros(8), torch.zeros(2)
    assert checkout.distinct_bytes([one, one[:4], other]) == 40
    if Path("/proc/self/clear_refs").exists():
        size = 32 * 2**20
        assert 0.9 * size < measuring.peak_memory(lambda: torch.ones(size // 4)) < 1.5 * size


def test_products_and_attention_are_counted_however_they_are_computed():
    arithmetic = importlib.import_module("arithmetic")
    x, weight = torch.zeros(1024, 64), torch.zeros(32, 64)
    products = [lambda: torch.nn.functional.linear(x, weight)]
    if AVAILABLE:
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    assert [arithmetic.counted_flops(product) for product in products] == [2 * 1024 * 64 * 32] * len(products)
    query, key, value = (torch.zeros(2, 3, tokens, 8).requires_grad_() for tokens in (16, 48, 48))
    forward = 2 * 2 * (2 * 3 * 16 * 48 * 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert arithmetic.counted_flops(lambda: attention(query, key, value)) == forward
    learned = arithmetic.counted_flops(lambda: attention(query, key, value).sum().backward())
    assert learned == forward + forward * 5 / 2
    assert arithmetic.product_rate(64, 64) > 0


@pytest.mark.parametrize("rank", [0, 4])
def test_our_side_is_one_computation_whatever_its_rows(rank):
    public = importlib.import_module("public")
    text = torch.randn(SHAPE.text_len, SHAPE.text_dim, generator=torch.Generator().manual_seed(0))
    model = public.transformer(SHAPE, rank)
    ours = public.Ours(model, rank, public.recorded_tape(SHAPE), text)
    ours.routes = [tuple(RoutedFrame(0, 9 + n + m) for m in range(5)) for n in range(public.BRANCHES)]
    (together, most), (single, fewer) = ours.rollout(), ours.rollout(rows=1)
    latents = together.groups[0].clean_MTCHW
    assert latents.shape == (5, public.FRAMES - public.FORK, 4, 4, 4)
    assert public.apart("rows", latents, single.groups[0].clean_MTCHW) < 1e-5 and fewer < most
    assert (latents[:-1] - latents[-1]).abs().amax((1, 2, 3, 4)).min() > 1e-4  # the routes matter
    plain = ours.energies(together.groups[0], steps=4, gradients=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    public.apart("energies", ours.energies(together.groups[0], steps=4, gradients=True), plain)
    before = {name: value.detach().clone() for name, value in ours.policy.parameters.items()}
    assert all(value.grad is not None for value in ours.policy.parameters.values())
    ours.step()
    assert any(not torch.equal(before[name], value) for name, value in ours.policy.parameters.items())
    with pytest.raises(SystemExit, match="disagree in latents"):
        public.apart("latents", latents + 1, latents)


def test_sides_take_turns_and_ratios_are_of_medians():
    public = importlib.import_module("public")
    order = []
    runs = {"rollout": {side: lambda side=side: order.append(side) for side in ("public", "ours", "one row")}}
    taken = public.alternated(runs, 2)
    assert order == ["public", "ours", "one row", "one row", "ours", "public"]
    assert [len(seconds) for seconds in taken["rollout"].values()] == [2, 2, 2]
    sides = {"public": [9.0, 4.0, 4.0], "ours": [2.0, 2.0, 1.0], "one row": [4.0, 4.0, 8.0]}
    held = {"public": 2**22, "ours": 2**21, "one row": 2**20}
    found = {
        "apart": {"rollout": 2e-6, "stream": 1e-6},
        "cache_bytes": held,
        "cpu_seconds": {phase: sides for phase in public.AIMS},
        "peak_bytes": {phase: held for phase in public.AIMS},
        "flops": {phase: {"ours": 150, "one row": 160} for phase in public.AIMS},
        "flops_per_second": 100.0,
    }
    numbers = {"sizes": {"small": {"LoRA": found}}}
    printed = public.ratios(numbers)
    assert "| rollout | 2.00 (2.67) | ≥ 2 |" in printed
    assert "| rollout, one row at a time | 1.00 (2.50) |" in printed
    assert "2e-06" in printed and "one row at a time | 4.0 / 1.0 |" in public.memory(numbers)
