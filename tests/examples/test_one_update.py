"""The example is the trainer's own update, bit for bit."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "one_update.py"


def test_one_update_arrives_where_the_trainer_does():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "largest difference to Trainer.step: 0"


def test_one_update_fits_on_a_few_screens():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 150
