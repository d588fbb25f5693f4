"""Direct a live stream from Python and save what the aligned model shows.

Start `kvpo live --run runs/demo`, then: python examples/live_client.py [URL]
"""

import json
import struct
import sys
from pathlib import Path

from websockets.sync.client import connect

URL = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8788/v1/realtime/video"
PROMPTS = {5: "A blue square drifts left in a meadow.", 10: "It turns green."}

with connect(URL, max_size=None) as socket:
    start = {
        "type": "session.start",
        "prompt": "A red circle drifts right by the sea.",
        "seed": 1,
        "speed": 0,
    }
    socket.send(json.dumps(start))
    for message in socket:
        if isinstance(message, str):
            print(message)
            continue
        (length,) = struct.unpack(">I", message[:4])
        header, pictures = json.loads(message[4 : 4 + length]), message[4 + length :]
        last = header["frames"][next(reversed(header["frames"]))][-1]
        Path(f"block-{header['block']:03d}.webp").write_bytes(pictures[-last:])
        if header["block"] in PROMPTS:
            socket.send(json.dumps({"type": "session.prompt_update", "prompt": PROMPTS[header["block"]]}))
        if header["block"] == 15:
            break
