"""Geometries of the Wan transformer: named ones, and files in the form of diffusers' config.json."""

from dataclasses import replace
from typing import Any

from kvpo.files import local_path, read_json
from kvpo.models.settings import WanShape

GEOMETRY_SETTING = "backbone.geometry"
_WAN_1_3B = WanShape(
    dim=1536,
    num_heads=12,
    num_layers=30,
    ffn_dim=8960,
    freq_dim=256,
    text_len=512,
    text_dim=4096,
    channels=16,
    patch_size=(1, 2, 2),
)
GEOMETRIES = {
    "world": WanShape(),
    "1.3b": _WAN_1_3B,
    "1.3b-relative": replace(_WAN_1_3B, relative_positions=True),
    "14b": replace(_WAN_1_3B, dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
}
"""The embedded world's geometry, Wan 2.1's 1.3B and 14B, and the 1.3B of LongLive's infinite variant."""
SIZE_FIELDS = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_channels": "channels",
    "eps": "eps",
}
"""Numeric fields of diffusers' ``WanTransformer3DModel`` that a file must have (and patch_size) -> ours."""
FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
"""Fields whose values are fixed in this package's transformer; a file may state them."""
IGNORED = {"out_channels", "rope_max_seq_len"}
"""Fields without a counterpart: output channels equal input channels, and positions have no limit."""


def geometry(name: str) -> WanShape:
    """The geometry of a name in GEOMETRIES, a JSON file, or a model's folder with its config.json.

    A file has the fields of diffusers' ``WanTransformer3DModel``, and optionally ``text_len`` (default 512)
    and ``relative_positions`` (default false). Raises ValueError naming the field that is missing, unknown or
    invalid.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    path = local_path(name, GEOMETRY_SETTING)
    if path.is_dir():
        path = next((file for file in (path / "config.json", path / "transformer/config.json")
                     if file.is_file()), path)  # fmt: skip
    if not path.is_file():
        raise ValueError(
            f"{GEOMETRY_SETTING}: {name!r} is not one of {', '.join(GEOMETRIES)}, nor a JSON file or a "
            "folder with a config.json"
        )
    try:
        fields = read_json(path)
    except ValueError as error:
        raise ValueError(f"{GEOMETRY_SETTING}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{GEOMETRY_SETTING}: {path} holds no fields")
    return _shape(fields, f"{GEOMETRY_SETTING}: {path}")


def fields_of(shape: WanShape) -> dict[str, Any]:
    """A geometry's fields as in a file; `geometry` reads them back, except for the size of the latents."""
    return {
        **{name: getattr(shape, ours) for name, ours in SIZE_FIELDS.items()},
        "patch_size": list(shape.patch_size),
        "text_len": shape.text_len,
        "relative_positions": shape.relative_positions,
    }


def _shape(fields: dict[str, Any], where: str) -> WanShape:
    found = {name: value for name, value in fields.items() if not name.startswith("_")}
    patch, text_len = found.pop("patch_size", None), found.pop("text_len", 512)
    relative = found.pop("relative_positions", False)
    for name, value in FIXED.items():
        if found.pop(name, value) != value:
            raise ValueError(f"{where}: {name} must be {value}, got {fields[name]!r}")
    if not (isinstance(patch, list) and len(patch) == 3 and all(type(side) is int for side in patch)):
        raise ValueError(f"{where}: patch_size must be three whole numbers, got {patch!r}")
    if type(text_len) is not int or type(relative) is not bool:
        raise ValueError(f"{where}: text_len is a whole number and relative_positions true or false")
    if fields.get("out_channels", fields.get("in_channels")) != fields.get("in_channels"):
        raise ValueError(f"{where}: out_channels must be in_channels, got {fields['out_channels']!r}")
    if unknown := sorted(found.keys() - SIZE_FIELDS.keys() - IGNORED):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    sizes: dict[str, Any] = {}
    for name, ours in SIZE_FIELDS.items():
        value, kind = found.get(name), float if name == "eps" else int
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{where}: {name} must be {what}, got {value!r}")
        sizes[ours] = kind(value)
    sizes["dim"] = sizes["num_heads"] * sizes.pop("head_dim")
    return WanShape(**sizes, text_len=text_len, patch_size=tuple(patch), relative_positions=relative)
