"""Prompt templates are recognised by their hash, never guessed."""

import hashlib

import pytest

from kvpo.rewards.hpsv3 import TEMPLATE_SHA256 as HPSV3_SHA256
from kvpo.rewards.pretrained import filled, read_template
from kvpo.rewards.videoalign import TEMPLATE_SHA256 as VIDEOALIGN_SHA256

TEXT = "\nrate «this» {text_prompt}\n"
DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()


def test_the_hashes_of_the_public_templates():
    assert VIDEOALIGN_SHA256 == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    assert HPSV3_SHA256 == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def test_text_files_and_python_files_give_the_same_bytes(tmp_path):
    (tmp_path / "t.txt").write_bytes(TEXT.encode())
    (tmp_path / "t.py").write_text(f'import nothing_there\n1 / 0\nX = """a"""\nY = """{TEXT}"""\n', "utf-8")
    assert read_template(tmp_path / "t.txt", DIGEST) == TEXT
    assert read_template(tmp_path / "t.py", DIGEST) == TEXT  # parsed, not run
    joined = hashlib.sha256(("a" + TEXT).encode()).hexdigest()
    assert read_template(tmp_path / "t.py", joined, parts=2) == "a" + TEXT


def test_other_bytes_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "t.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    with pytest.raises(ValueError, match="take the file unchanged from the model's repository"):
        read_template(tmp_path / "t.txt", DIGEST)
    with pytest.raises(ValueError, match="no such prompt template"):
        read_template(tmp_path / "absent.txt", DIGEST)


def test_prompts_are_put_in_as_they_are():
    assert filled("a {text_prompt} {x}", "{text_prompt} \\1 {y}") == "a {text_prompt} \\1 {y} {x}"
