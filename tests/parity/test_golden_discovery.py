"""Every file of the golden directory is found by what it says it is, or named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.parity import fixtures
from tests.parity.fixtures import kind_of, load, metadata, of_kind, read, segments_of, unknown_files


@pytest.mark.parametrize("path", unknown_files(), ids=lambda path: path.stem)
def test_golden_files_of_other_kinds(path):
    if not path.exists() or kind_of(path) is None:
        pytest.skip(f"{path.name} in {path.parent} is not a fixture")
    read(path)


def put(directory, name, **meta):
    """A fixture file with one number in it."""
    path = directory / name
    save_file({"noise": torch.zeros(1)}, path, {"meta": json.dumps(meta)})
    return path


def test_golden_files_are_found_whatever_they_are_called(tmp_path):
    stream = put(tmp_path, "b anything.safetensors", kind="stream")
    other = put(tmp_path, "a.safetensors", kind="stream", model="memflow")
    put(tmp_path, "c.safetensors", kind="units")
    strange = put(tmp_path, "d.safetensors", kind="dance")
    unnamed = put(tmp_path, "e.safetensors", model="longlive")
    save_file({"noise": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    (tmp_path / "notes.txt").write_text("not a fixture")
    assert of_kind("stream", directory=tmp_path) == [other, stream]
    (absent,) = of_kind("routing", directory=tmp_path)
    assert not absent.exists() and "routing" in absent.name
    assert {path.name for path in unknown_files(tmp_path)} == {
        strange.name, unnamed.name, "weights.safetensors", "torn.safetensors",
    }  # fmt: skip
    with pytest.raises(ValueError, match="kind = 'dance' is not known"):
        read(strange)
    with pytest.raises(ValueError, match="kind = None is not known"):
        read(unnamed)


def test_golden_files_without_their_weights_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, "GOLDEN", tmp_path)
    plain = put(tmp_path, "plain.safetensors", kind="stream")
    adapted = put(tmp_path, "adapted.safetensors", kind="stream", lora=True)
    with pytest.raises(pytest.skip.Exception, match="plain.safetensors needs tiny_base.pt"):
        load(plain)
    (tmp_path / "tiny_base.pt").touch()
    assert load(plain)[0]["model"] == "longlive"
    with pytest.raises(pytest.skip.Exception, match="adapted.safetensors needs tiny_lora.pt"):
        load(adapted)
    with pytest.raises(pytest.skip.Exception, match="no replay fixture"):
        load(*of_kind("replay", directory=tmp_path))
    assert of_kind("replay", directory=tmp_path / "absent")


@pytest.mark.parametrize(
    "field, value",
    [
        ("model", "wan"), ("dtype", "float16"), ("window", -2), ("window", 5), ("sink", -1), ("sink", 1.5),
        ("bank_size", "3"), ("switches", [9, 6]), ("switches", 9), ("keep_sink_at_switch", 1), ("lora", None),
    ],
)  # fmt: skip
def test_golden_metadata_that_is_not_known_is_named(field, value):
    with pytest.raises(ValueError, match=f"fixture metadata: {field} = "):
        metadata("stream", **{field: value})


def test_golden_switches_act_as_in_the_public_pipelines():
    """One prompt per block of a stream; the sampler goes to the prompt of a chunk's start at once."""
    assert segments_of(metadata("stream", switches=[0, 4, 5, 99]), 15) == [1, 1, 2, 3, 3]
    assert segments_of(metadata("stream", switches=[3]), 12, given=6) == [0, 0, 1, 1]
    routing = dict(
        fork_frame=39, branch_chunk_start=39, perturbed_blocks=1, resident_frames=33,
        nearest_counting_current_block=4, used_frames=[],
    )  # fmt: skip
    found = segments_of(metadata("routing", switches=[3, 22, 30, 42], **routing), 60)
    assert found == [0] * 7 + [1] * 6 + [3] * 6 + [4]
