"""Every example of a message in docs/live.md, sent to a server and compared with its answer."""

import json
import re
import subprocess
import sys
from pathlib import Path

from kvpo.live.protocol import MESSAGES, Code
from kvpo.world.grammar import parse
from tests.live.live_server import serving
from tests.live.stage import scheduler, stage

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "examples" / "live_client.py"
TEXT = (ROOT / "docs" / "live.md").read_text(encoding="utf-8")
EXAMPLES = [
    (who, json.loads(body)) for who, body in re.findall(r"```json (client|server)\n(.*?)\n```", TEXT, re.S)
]


def test_documented_messages_get_the_documented_answers(tmp_path):
    arms = ("base", "aligned")
    with serving(tmp_path, scheduler(stage(), arms=arms)) as served, served.connect() as client:
        for who, example in EXAMPLES:
            if who == "client":
                client.send(**example)
                continue
            if example["type"] == "video.block":
                answer = client.until("video.block", block=example["block"])
            else:
                answer = client.until(example["type"])
            assert example.keys() <= answer.keys(), example["type"]
            for name, value in example.items():
                assert type(answer[name]) is type(value), (example["type"], name)
            if example["type"] == "error":
                assert answer == example


def test_documented_prompts_can_be_read():
    prompts = [*re.findall(r'"prompt": "(.*?)"', TEXT), *re.findall(r'"([A-Z][^"]+\.)"', CLIENT.read_text())]
    assert len(set(prompts)) > 2
    for prompt in prompts:
        parse(prompt)


def test_every_message_and_code_is_documented():
    for name in MESSAGES:
        assert f'"type": "{name}"' in TEXT, name
    assert all(f"`{code}`" in TEXT for code in Code.__args__)


def test_the_example_client(tmp_path):
    with serving(tmp_path, scheduler(stage())) as served:
        url = f"ws://127.0.0.1:{served.port}/v1/realtime/video"
        command = [sys.executable, str(CLIENT), url]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("block-*.webp"))) == 16
    assert done.stdout.count("session.prompt_update.accepted") == 2
