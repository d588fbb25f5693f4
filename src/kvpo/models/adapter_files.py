"""Read LoRA adapters in every public layout, converting to PEFT's layout and the scale that files state.

A layer computes ``y = W x + b + (alpha / rank) B (A x)``. Alpha may be stated in an ``adapter_config.json``
beside the file, in a safetensors header, or in an entry or a tensor of the file. All statements must agree;
without any, alpha is assumed to be the rank.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from kvpo.files import named_list, parse_json, read_json
from kvpo.models.checkpoints import (
    ADAPTER_ENTRIES,
    ADAPTER_KEY,
    PREFIX,
    choose_entry,
    in_wan_names,
    refuse_layout,
    say_prefixes,
    to_diffusers_name,
)
from kvpo.models.tensor_files import read_tensor_file, require_numbers, safetensors_header

T = TypeVar("T")
PEFT_PREFIX = "base_model.model."
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_ADAPTER_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"

_HALVES = {"down": "A", "up": "B"}
"""Names of A and B in files of kohya's trainers and of older diffusers."""
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_RANKS = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
} | {
    name: (None, False, [], {})
    for name in ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "target_parameters",
                 "trainable_token_indices", "layer_replication", "alora_invocation_tokens")
}  # fmt: skip
"""Fields of PEFT's configuration that change the formula above, with the values that leave it unchanged."""
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of A and B that also change the base weights."""
_SAYS_NOTHING = ("", "None", "none", "null", "False", "false", "Dynamic")
"""Values of header fields (always strings) that mean the field is not set."""


@dataclass(frozen=True)
class AdapterState:
    """A LoRA adapter in PEFT's public layout (``base_model.model.<module>.lora_A.weight``).

    Its effect on a layer is ``y = W x + b + scale(layer) B (A x)``.
    """

    tensors: dict[str, Tensor]
    rank: int
    """Rank of all layers, or of most of them."""
    alpha: float
    """Alpha of every layer that ``alphas`` does not name; the layer's scale is alpha / rank."""
    source: str
    files: tuple[Path, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Alpha by module, for layers where it differs from ``alpha``."""
    stated: str = ""
    """The place that states alpha; empty if none does, and alpha is assumed to be the rank."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Bare names of the adapted layers."""
        halves = (key.removeprefix(PEFT_PREFIX) for key in self.tensors)
        return tuple(
            half.removesuffix(".lora_A.weight") for half in halves if half.endswith(".lora_A.weight")
        )

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank]`` of an adapted layer."""
        prefix = f"{PEFT_PREFIX}{module}.lora_"
        return self.tensors[prefix + "A.weight"], self.tensors[prefix + "B.weight"]

    def scale(self, module: str) -> float:
        """Factor of ``B A`` in an adapted layer."""
        return self.alphas.get(module, self.alpha) / self.pair(module)[0].shape[0]

    def described(self) -> str:
        """Rank and alpha in words, and where they come from."""
        ranks = sorted({self.pair(module)[0].shape[0] for module in self.modules})
        alphas = sorted({self.alphas.get(module, self.alpha) for module in self.modules})
        where = self.stated or "assumed to be the rank; where it is not, add an entry lora_alpha to the file"
        return (
            f"{len(self.modules)} layers of rank {_span(ranks)}, alpha {_span(alphas)} ({where})"
            f", from {self.source}"
        )


def _span(values: list[int] | list[float]) -> str:
    return f"{values[0]:g}" + f" to {values[-1]:g}" * (len(values) > 1)


def in_peft_layout(pairs: Mapping[str, tuple[T, T]]) -> dict[str, T]:
    """Values for A and B by module, flattened to one mapping under PEFT's tensor names."""
    return {
        f"{PEFT_PREFIX}{module}.lora_{half}.weight": value
        for module, pair in pairs.items()
        for half, value in zip("AB", pair, strict=True)
    }


def adapter_of(
    tensors: dict[str, Tensor],
    alphas: Mapping[str, float],
    source: str,
    files: tuple[Path, ...] = (),
    stated: str = "",
) -> AdapterState:
    """Build an adapter from tensors in PEFT's layout and the alpha of each of its layers."""
    adapter = AdapterState(tensors, 0, 0.0, source, files, alphas, stated)
    ranks = Counter(adapter.pair(module)[0].shape[0] for module in alphas)
    rank = ranks.most_common(1)[0][0]
    alpha = Counter(a for m, a in alphas.items() if adapter.pair(m)[0].shape[0] == rank).most_common(1)[0][0]
    others = {module: value for module, value in alphas.items() if value != alpha}
    return AdapterState(tensors, rank, alpha, source, files, others, stated)


@dataclass(frozen=True)
class _Statement:
    """Rank and alpha as one place states them; None: not stated."""

    where: str
    rank: float | None = None
    alpha: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    """By pattern of module names, matched as in PEFT; likewise ``alphas``."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    root: bool = False
    """True for rank-stabilised LoRA: the scale is alpha / sqrt(rank)."""


def _statement(fields: Mapping[str, object], where: str) -> _Statement:
    """Read rank and alpha from a PEFT configuration, or from a header under any of their usual names.

    Raises:
        ValueError: values that are not positive numbers, conflicting alphas or ranks, fields that change the
            formula.
    """
    used = [name for name, plain in _PLAIN.items() if fields.get(name) not in plain]
    if str(fields.get("init_lora_weights")).startswith(_BASE_CHANGING):
        used.append("init_lora_weights")
    if used:
        raise ValueError(f"{where}: settings that are not supported: {named_list(used)}; only plain LoRA is")

    def one(names: Iterable[str]) -> float | None:
        found = {name: _positive(fields[name], f"{where}: {name}") for name in names if name in fields}
        if len(set(found.values())) > 1:
            raise ValueError(f"{where}: {' but '.join(f'{name} {value:g}' for name, value in found.items())}")
        return next(iter(found.values()), None)

    def pattern(name: str) -> dict[str, float]:
        given = fields.get(name) or {}
        given = parse_json(given) if isinstance(given, str) else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}: {name} must map names of layers to numbers, got {given!r:.60}")
        return {key: _positive(value, f"{where}: {name} of {key}") for key, value in given.items()}

    root = fields.get("use_rslora") in (True, "True", "true")
    ranks, alphas = pattern("rank_pattern"), pattern("alpha_pattern")
    return _Statement(where, one(_RANKS), one(_ALPHAS), ranks, alphas, root)


def _positive(value: object, what: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str | Tensor) else math.nan
    except (OverflowError, RuntimeError, ValueError):  # a huge integer, a tensor of several, a word
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r:.60}")
    return number


def _config_statement(path: Path) -> _Statement:
    fields = read_json(path)
    if not isinstance(fields, dict) or "lora_alpha" not in fields:
        raise ValueError(f"{path}: not a PEFT adapter configuration with lora_alpha")
    return _statement(fields, str(path))


def _header_statements(path: Path) -> list[_Statement]:
    """Statements in a safetensors header: in its own fields, and in the JSON field that diffusers writes."""
    header = safetensors_header(path)
    fields = {name: value for name, value in header.items() if value not in _SAYS_NOTHING}
    found = [_statement(fields, f"the header of {path}")]
    if DIFFUSERS_HEADER in header:
        where = f"{DIFFUSERS_HEADER} in the header of {path}"
        try:
            settings = parse_json(header[DIFFUSERS_HEADER])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: not a JSON object")
        # Its fields are PEFT's, prefixed with the component's name, such as transformer.lora_alpha.
        own = {name.removeprefix("transformer."): value for name, value in settings.items()}
        found.append(_statement(own, where))
    return found


def load_adapter_state(path: str | Path, *, entry: str | None = None, quiet: bool = False) -> AdapterState:
    """Load a LoRA adapter of any public layout into PEFT's layout; if no alpha is stated, it is the rank.

    Understands LongLive's and MemFlow's ``lora.pt``, KVPO's checkpoints (adapter, ``ema``), PEFT's files,
    directories and whole models (with or without the adapter's name in the keys), diffusers LoRA files, and
    those of kohya's and musubi's trainers, diffusion-pipe, ComfyUI and DiffSynth.

    Args:
        path: a file or a directory.
        entry: top-level entry of a ``.pt`` file, by default the first of ADAPTER_ENTRIES that is present; the
            moving average of a KVPO checkpoint is ``ema``.
        quiet: do not log removed prefixes.

    Raises:
        ValueError: unreadable file, no adapter in it, layers with only one half, A or B zero in every layer,
            conflicting ranks or alphas.
    """
    path = Path(path)
    if path.is_dir():
        path = _adapter_file(path)
    content = read_tensor_file(path)
    named = {name: content.pop(name) for name in (*_ALPHAS, *_RANKS) if name in content}
    statements = [_statement(named, f"an entry of {path}"), *_header_statements(path)]
    nested = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name, value in nested.items():
        if "lora" in name and not value.keys().isdisjoint(_ALPHAS):
            statements.append(_statement(value, f"entry {name} of {path}"))
    # The configuration of a symbolic link is beside the link (as in the hub's cache) or beside its target.
    places = [folder / PEFT_CONFIG for folder in (path.resolve().parent, path.parent)]
    for beside in {place.resolve(): place for place in places}.values():
        if beside.is_file() and not nested and path.name != DIFFUSERS_ADAPTER_NAME:
            statements.append(_config_statement(beside))
    tensors, source = choose_entry(content, entry, ADAPTER_ENTRIES, str(path))
    require_numbers({name: t for name, t in tensors.items() if not name.endswith(".alpha")}, source)
    if not quiet:
        say_prefixes(tensors, source)
    pairs, own = _adapter_layers(tensors, source)
    public = in_peft_layout({module: (halves["A"], halves["B"]) for module, halves in pairs.items()})
    if not any(pairs[module]["A"].float().any() and pairs[module]["B"].float().any() for module in pairs):
        raise ValueError(
            f"{source}: A or B of every layer is zero, so that the adapter changes nothing; without it "
            "(backbone.lora empty) training starts from a fresh one"
        )
    statements += [_Statement(f"tensors of {path}", alphas=own)] if own else []
    ranks = {module: halves["A"].shape[0] for module, halves in pairs.items()}
    alphas, stated = _agreed(statements, ranks, source)
    return adapter_of(public, alphas, source, (path,), stated)


def _adapter_file(directory: Path) -> Path:
    for name in (*PEFT_FILES, DIFFUSERS_ADAPTER_NAME):
        if (directory / name).is_file():
            return directory / name
    if len(single := sorted(directory.glob("*.safetensors"))) == 1:
        return single[0]
    raise ValueError(
        f"{directory}: no adapter ({', '.join((*PEFT_FILES, DIFFUSERS_ADAPTER_NAME))}); "
        f"the directory holds {named_list(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def _adapter_layers(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """A and B per adapted layer (bare Wan name), and alpha per layer that has a tensor for it.

    Raises:
        ValueError: no adapter, another kind of adapter, layers that lack A or B, A and B of different ranks.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas, strangers = {}, []
    refuse_layout(tensors, source)
    whole = any(".base_layer." in name for name in tensors)  # a whole PEFT model: skip its base weights
    for name, tensor in in_wan_names(tensors, source).items():
        match = ADAPTER_KEY.match(name)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = _positive(tensor, f"{source}: {name}")
        elif match is None and whole:
            continue
        elif match is None or tensor.ndim != 2:
            strangers.append(name)
        else:
            halves, half = pairs.setdefault(match["module"], {}), _HALVES.get(match["half"], match["half"])
            if half in halves:
                raise ValueError(f"{source}: {match['module']} has {half} of several adapters; save one")
            halves[half] = tensor
    strangers += [f"{name}.alpha" for name in alphas if name not in pairs]
    if not pairs:
        base = any(name.startswith("blocks.") for name in strangers)
        raise ValueError(
            f"{source}: holds no adapter (keys like {named_list(list(tensors)[:2]) or 'none'})"
            + "; is it a base model?" * base
        )
    if strangers:
        raise ValueError(f"{source}: keys that are not halves of a LoRA layer: {named_list(strangers)}")
    if single := [f"{m} (only {''.join(halves)})" for m, halves in pairs.items() if len(halves) < 2]:
        raise ValueError(f"{source}: layers with one half of an adapter: {named_list(single)}")
    ranks = {module: (halves["A"].shape[0], halves["B"].shape[1]) for module, halves in pairs.items()}
    if other := [f"{module} (A {a}, B {b})" for module, (a, b) in ranks.items() if a != b or a == 0]:
        raise ValueError(f"{source}: layers whose halves have no common rank: {named_list(other)}")
    return pairs, alphas


def _agreed(
    statements: list[_Statement], ranks: Mapping[str, int], source: str
) -> tuple[dict[str, float], str]:
    """Alpha of every layer (its scale is alpha / rank), and the places that state it.

    Raises:
        ValueError: two places disagree; the message has both values.
    """
    root = any(statement.root for statement in statements)
    alphas: dict[str, float] = {}
    used: list[str] = []
    silent = False
    for module, rank in ranks.items():
        said: dict[str, float] = {}
        for statement in statements:
            stated_rank = _of(module, statement.ranks, statement.rank, statement.where)
            if stated_rank not in (None, rank):
                raise ValueError(
                    f"{source}: {module} has rank {rank}, but {statement.where} states {stated_rank:g}"
                )
            if (value := _of(module, statement.alphas, statement.alpha, statement.where)) is not None:
                said[statement.where] = value
        if len(set(said.values())) > 1:
            raise ValueError(
                f"{source}: alpha of {module} is "
                + ", but ".join(f"{value:g} according to {where}" for where, value in said.items())
            )
        used += said
        silent = silent or not said
        stated = next(iter(said.values()), None)
        alphas[module] = float(rank) if stated is None else stated * (math.sqrt(rank) if root else 1.0)
    for statement in statements:
        where = statement.where
        unmatched = [key for key in (*statement.ranks, *statement.alphas)
                     if not any(_of(module, {key: 1.0}, None, where) for module in ranks)]  # fmt: skip
        if unmatched:
            raise ValueError(
                f"{source}: {where} names layers that the adapter does not have: {named_list(unmatched)}"
            )
    where = " and ".join(dict.fromkeys(used)) + ", over the root of the rank" * root
    return alphas, where + ", the rank where nothing is stated" * (bool(where) and silent)


def _of(module: str, patterns: Mapping[str, float], default: float | None, where: str) -> float | None:
    """Value of the first pattern that matches the end of a layer's name, in Wan's or diffusers' naming.

    Raises ValueError, naming ``where``, for an invalid pattern.
    """
    for pattern, value in patterns.items():
        bare = PREFIX.sub("", pattern)
        try:
            if any(re.fullmatch(rf"(.*\.)?({bare})", name) for name in (module, to_diffusers_name(module))):
                return value
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is not a pattern of layer names: {error}") from error
    return default
