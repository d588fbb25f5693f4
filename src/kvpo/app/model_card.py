"""README.md of exported weights: a model card for the Hugging Face hub."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kvpo.app.configuration import flag_text
from kvpo.app.evaluate import numbers_file
from kvpo.app.origin import settings_of
from kvpo.app.presets import PRESETS
from kvpo.files import read_json
from kvpo.models.adapter_files import DIFFUSERS_ADAPTER_NAME
from kvpo.models.hub import repository_of

CARD = "README.md"
_BASE_FOLDERS = 3
"""Number of places to look for a base's card: the checkpoint itself, its folder and the one above."""

_WORDS = {
    "peft": "a LoRA adapter in PEFT's layout",
    "diffusers-lora": "a LoRA adapter in diffusers' layout",
    "comfy": "a LoRA adapter in ComfyUI's layout",
    "diffusers": "a whole transformer in diffusers' layout",
    "pt": "a whole transformer in the public layout of LongLive, MemFlow and Self-Forcing",
}
WHOLE = ("diffusers", "pt")
"""Layouts of all weights."""
_USES = {
    "peft": ("PEFT", "```python\nfrom peft import PeftModel\n\n"
             "model = PeftModel.from_pretrained(transformer, \"{folder}\")  # Wan's own names\n```"),
    "diffusers-lora": ("diffusers", "```python\ntransformer.load_lora_adapter(\"{folder}\", "
                       "use_safetensors=True)\n# in a pipeline: pipe.load_lora_weights(\"{folder}\")\n```"),
    "diffusers": ("diffusers", "```python\nfrom diffusers import WanTransformer3DModel\n\n"
                  "transformer = WanTransformer3DModel.from_pretrained(\"{folder}\")\n```"),
    "pt": ("LongLive, MemFlow and Self-Forcing", "Give `{folder}` as the generator's checkpoint."),
    "comfy": ("ComfyUI", "Put `{file}` into `models/loras` and load it with *LoraLoaderModelOnly* behind the "
              "base, at strength 1. Scope and others that read `diffusion_model.` names take the same file."),
}  # fmt: skip


def licence_of(checkpoint: Path | None) -> str:
    """The licence in the card next to a base's file, or in a folder above; ``other`` if there is none."""
    for folder in [checkpoint, *checkpoint.parents][:_BASE_FOLDERS] if checkpoint is not None else ():
        if (card := folder / CARD).is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
            try:
                fields = yaml.safe_load(match[1]) if match else None
            except yaml.YAMLError:
                fields = None
            if isinstance(fields, dict) and isinstance(fields.get("license"), str):
                return str(fields["license"])
    return "other"


def model_card(layout: str, folder: Path, record: Mapping[str, Any], licence: str, run: Path) -> str:
    """The card of an export to ``folder``; ``run`` holds the numbers measured on held-out prompts."""
    base, alone = record["base"] or "the embedded generator of kvpo", layout not in WHOLE
    repo = repository_of(record["base"])
    fields = {
        "license": licence,
        **({"base_model": repo, "base_model_relation": "adapter" if alone else "finetune"} if repo else {}),
        **({} if layout == "pt" else {"library_name": "peft" if layout == "peft" else "diffusers"}),
        "pipeline_tag": "text-to-video",
        "tags": ["kvpo", "streaming-video", *(["lora"] if alone else [])],
    }
    added = f" It continues the adapter `{record['lora']}` and takes its place." if record["lora"] else ""
    if "added_to" in record:
        added = f" It is to be added to the adapter `{record['added_to']}`, which is loaded first."
        if record["lost"]:
            lost = f"{100 * record['lost']:.2g} %"
            added += f" It is the best difference of rank {record['rank']}, without {lost} of the whole."
    rewards = ", ".join(f"`{name}`" for name in record["rewards"])
    parts = [
        "---\n" + yaml.safe_dump(fields, sort_keys=False).strip() + "\n---",
        f"# {folder.name}",
        f"This is {_WORDS[layout]}, aligned online with {rewards} by the method `{record['method']}` of "
        f"[kvpo](https://arxiv.org/abs/2605.14278) {record['kvpo']}. Its base is `{base}`.{added}",
        "## Loading",
        _loading(layout, folder, record),
        "## Held-out prompts",
        _numbers(record, run),
        "## Made with",
        _table(record),
        "## Licence",
        "The base's licence holds for these weights: "
        + (
            f"`{licence}`."
            if licence != "other"
            else f"see `{base}`, whose card was not found by the export."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _loading(layout: str, folder: Path, record: Mapping[str, Any]) -> str:
    files = {"diffusers-lora": DIFFUSERS_ADAPTER_NAME, "comfy": f"{folder.name}.safetensors"}
    program, use = _USES[layout]
    use = use.replace("{folder}", folder.name).replace("{file}", files.get(layout, ""))
    flag = "checkpoint" if layout in WHOLE else "lora"
    base = f" --backbone.checkpoint {record['base']}" if flag == "lora" else ""
    name = folder.name
    if "added_to" in record:
        name = f"{record['added_to']},{name} --backbone.lora_start merge"
    preset = record["settings"]["preset"]
    usual = settings_of(PRESETS[preset]())
    changed = [shlex.quote(word) for path, value in record["settings"].items() if value != usual[path]
               for word in (f"--{path}", flag_text(value))]  # fmt: skip
    own = (
        f"kvpo:\n\n```\nkvpo generate --preset {preset}{base} \\\n"
        f"  --backbone.{flag} {' '.join([name, *changed])} --prompts prompts.txt --out videos\n```\n\n"
    )
    if not record["base"]:
        own = ""  # the embedded world's base takes no adapter, and its run generates the videos
    others = {"PEFT": "peft", "diffusers": "diffusers-lora", "ComfyUI": "comfy"}
    others.pop(program, None)
    part = " --difference" if "added_to" in record else ""
    rest = "; ".join(f"for {to}, `kvpo export RUN --layout {other}{part}`" for to, other in others.items())
    return f"{program}:\n\n{use}\n\n{own}Other programs read other layouts: {rest}."


def _numbers(record: Mapping[str, Any], run: Path) -> str:
    """The run's first test of exactly these weights, as a table."""
    these = record["checkpoint"], record["weights"]
    tested = next((numbers for *whose, numbers in _tests(run) if tuple(whose) == these), None)
    if tested is None or record.get("lost"):
        return "These weights were not tested on held-out prompts (`kvpo evaluate` does)."
    lines = ["| prompts | n | base | aligned | gain, paired | standard error |", "|---|---|---|---|---|---|"]
    for name, own in tested["held_out"].items():
        means = f"{own['base_mean']:.4f} | {own['aligned_mean']:.4f} | {own['paired_gain']:+.4f}"
        lines.append(f"| {name} | {own['prompts']} | {means} | {own['paired_se']:.4f} |")
    return "\n".join(lines) + f"\n\n{tested['verdict']}"


def _tests(run: Path) -> Iterator[tuple[Any, Any, Mapping[str, Any]]]:
    """Yield checkpoint, weights and numbers of the run's own test, then of `kvpo evaluate`."""
    for file in (run / "summary.json", numbers_file(run, "test")):
        numbers = read_json(file) if file.is_file() else {}
        if checked := numbers.get("checked"):
            yield f"update-{checked['update']:06d}", checked["weights"], numbers
        elif "frames" not in numbers:  # videos that begin with given frames are another test
            yield numbers.get("checkpoint"), numbers.get("weights"), numbers


def _table(record: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in record.items() if name not in ("settings", "kvpo")}
    rows = (shown | record["settings"]).items()
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows)])
