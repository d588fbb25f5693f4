"""The demo runs with the hard dependencies alone; everything else names its missing extra."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_EXTRAS = "diffusers ftfy sentencepiece cv2 httpx fastapi starlette uvicorn torchvision pyarrow".split()
PACKAGE_DATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
MODULES = {"opencv-python-headless": "cv2", "pyyaml": "yaml", "pillow": "PIL"}
"""Distribution -> its module, if the names differ."""

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        missing = name.partition(".")[0] in {missing}
        return None if missing else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``code`` as if no package of an extra were installed."""
    script = WITHOUT.replace("{missing}", repr(set(OF_EXTRAS))) + code
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


LACKING = [
    (["align", "--preset", "longlive-1.3b", "--out", "run"], "wan"),
    (["score", ".", "--reward", "motion_smoothness"], "rewards"),
    (["calibrate", "motion_smoothness", "--out", "a.json"], "rewards"),
    (["reward-server", "--reward", "world"], "server"),
    (["arena", "study"], "server"),
    (["arena", "report", "study/votes.parquet"], "parquet"),
    (["align", "--rewards.scorers", "world@http://127.0.0.1:1", "--out", "run"], "server"),
]


def test_what_needs_an_extra_names_it_in_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    code = f"""
import os
from kvpo.app.cli import main
os.chdir({str(tmp_path)!r})
for arguments in {[arguments for arguments, _ in LACKING]!r}:
    print("status", main(arguments), file=sys.stderr)
"""
    found = without_extras(code)
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    *said, rest = re.split(r"status (\d+)\n", found.stderr)
    assert not rest and said[1::2] == ["1"] * len(LACKING), found.stderr
    for text, (arguments, extra) in zip(said[::2], LACKING, strict=True):
        line = text.strip().splitlines()[-1]
        assert re.fullmatch(
            rf"kvpo: error: \w+ is not installed; install it with: pip install 'kvpo\[{extra}\]'", line
        ), (arguments, text)


def test_the_embedded_generator_needs_no_extra(tmp_path, tiny_base):
    code = """
from pathlib import Path
from kvpo.app.align import align
from kvpo.app.evaluate import evaluate
from kvpo.app.export import export
from kvpo.app.generate import generate
from tests.tiny_world import tiny_config
base, out = map(Path, sys.argv[1:])
config = tiny_config(base, optim__updates=1, stream__schedule=(1.0, 0.5))
assert align(config, out / "run")["updates"] == 1
evaluate(out / "run")
generate(config, out / "videos", run=out / "run", checkpoint="latest")
export(out / "run", out / "adapter", layout="peft", checkpoint="latest")
"""
    found = without_extras(code, str(tiny_base), str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "report.html").exists() and list((tmp_path / "videos").glob("*.mp4"))


def test_hard_dependencies_are_imported_and_others_belong_to_an_extra():
    names = [re.match(r"[\w-]+", line)[0].lower() for line in PROJECT["dependencies"]]
    hard = {MODULES.get(name, name.replace("-", "_")) for name in names}
    extras = PROJECT["optional-dependencies"]
    optional = {
        MODULES.get(name, name.replace("-", "_"))
        for extra in ("wan", "rewards", "raft", "server", "parquet", "trackers")
        for name in (re.match(r"[\w-]+", line)[0].lower() for line in extras[extra])
    }
    imported = set()
    for path in (ROOT / "src" / "kvpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"kvpo"}
    assert hard - outside == {"tensorboard"}, "torch.utils.tensorboard imports it"
    assert outside - hard <= optional | {"starlette", "pydantic"}, "fastapi is built on them"
    assert set(OF_EXTRAS) <= optional | {"starlette"}


def test_an_installed_package_has_every_file_of_the_checkout():
    package = ROOT / "src/kvpo"
    packed = {path for pattern in PACKAGE_DATA["kvpo"] for path in package.glob(pattern)}
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    assert others <= packed
