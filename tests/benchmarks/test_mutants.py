"""The mutation run: what it changes, how it knows a change again, and that nothing it runs lingers."""

import ast
import importlib
import time

SOURCE = '''
"""A module."""

LIMIT = 3


def scaled(value, rate=0.5, *, clip):
    """A docstring is no statement to drop."""
    if value is None:
        raise ValueError(f"value = {1 + 1}")
    table = {}
    table["at"] = [rate * one for one in value[1:]]
    return clamp(max(table["at"]), clip) if clip and rate > 0 else scaled(value, rate=1.0, clip=True)
'''
CHANGES = {
    "constant": {
        "LIMIT = 3": "LIMIT = 4",
        "rate=0.5": "rate=1.5",
        "1:": "2:",
        "rate > 0": "rate > 1",
        "rate=1.0": "rate=2.0",
        "clip=True": "clip=False",
    },
    "comparison": {"value is None": "value is not None", "rate > 0": "rate >= 0"},
    "logic": {"clip and rate > 0": "clip or rate > 0"},
    "arithmetic": {"rate * one": "rate / one"},
    "slice": {"value[1:]": "value[:]"},
    "argument": {"scaled(value, rate=1.0, clip=True)": "scaled(value, clip=True)"},
    "function": {
        "max(table['at'])": "min(table['at'])",
        "clamp(max(table['at']), clip)": "max(table['at'])",
    },
    "statement": {
        "table['at'] = [rate * one for one in value[1:]]": "pass",
        "raise ValueError(f'value = {1 + 1}')": "pass",
    },
}


def mutants(source):
    mutations = importlib.import_module("mutations")
    return mutations.mutants_of("some/file.py", source, mutations.Signatures.of([source]))


def test_every_kind_of_change_is_made_once_and_changes_the_code():
    found = mutants(SOURCE)
    changes = [(one.operator, *one.change.split("  ->  ")) for one in found if one.operator != "choice"]
    expected = [(kind, *pair) for kind, pairs in CHANGES.items() for pair in pairs.items()]
    assert sorted(changes) == sorted(expected)
    assert len([one for one in found if one.operator == "choice"]) == 2
    trees = {ast.dump(ast.parse(one.text)) for one in found}
    assert len(trees) == len(found) and ast.dump(ast.parse(SOURCE)) not in trees


def test_a_mutant_is_known_by_its_text_wherever_it_stands():
    moved = "import math\n\n\nclass Later:\n    size = 7\n\n\n" + SOURCE
    keys = [one.key for one in mutants(SOURCE)]
    assert len(set(keys)) == len(keys)
    assert [one.key for one in mutants(moved) if "size" not in one.change] == keys
    ranks = {one.key: one.rank("k") for one in mutants(SOURCE)}
    assert all(ranks[one.key] == one.rank("k") for one in mutants(moved) if one.key in ranks)


def test_equal_changes_of_one_function_have_numbers():
    found = mutants("def twice(a):\n    return a + 1, a + 1\n")
    assert sum(one.change.endswith("  (2)") for one in found) == 2
    assert len({one.key for one in found}) == len(found) == 4


def test_a_mutant_is_in_place_while_its_job_runs_and_gone_afterwards(tmp_path):
    run = importlib.import_module("mutants")
    (mutant, *_) = mutants("LIMIT = 3\n")
    for name in ("original", "0"):
        (tmp_path / name / "some").mkdir(parents=True)
        (tmp_path / name / "some" / "file.py").write_text("LIMIT = 3\n")

    def hang():
        time.sleep(60)

    path = tmp_path / "0" / "some" / "file.py"
    jobs = [
        run.Job(path.read_text, 30, mutant),
        run.Job(path.read_text, 30),
        run.Job(hang, 0.1),
        run.Job(hang, 0.1, mutant),
    ]
    started = time.monotonic()
    results = [result for _, result in run.run_jobs(jobs, [tmp_path / "0"])]
    assert results == ["LIMIT = 4\n", "LIMIT = 3\n", None, None]
    assert time.monotonic() - started < 30
    assert path.read_text() == "LIMIT = 3\n"


def test_reviewed_mutants_count_apart():
    run = importlib.import_module("mutants")
    (mutant, *_) = mutants("LIMIT = 3\n")
    caught = run.outcome(mutant, {"failure": ["a_test", "AssertionError"]}, {mutant.key: "why"})
    assert (caught.outcome, caught.test, caught.reason) == ("assertion", "a_test", "")
    assert run.outcome(mutant, {"failure": ["a_test", "TypeError"]}, {}).outcome == "error"
    assert run.outcome(mutant, None, {}).outcome == "time"
    survivors = [run.outcome(mutant, {"failure": None}, reasons) for reasons in ({}, {mutant.key: "why"})]
    assert [one.outcome for one in survivors] == ["survived", "survived"]
    assert run.table([caught, *survivors]).splitlines()[-1] == "| all | 3 | 1 | 0 | 0 | 1 | 1 |"


def test_a_result_is_kept_until_something_changes_that_its_test_imports(tmp_path, monkeypatch):
    kept = importlib.import_module("kept")
    files = {
        "src/kvpo/__init__.py": "",
        "src/kvpo/low.py": "LOW = 1\n",
        "src/kvpo/high.py": "def late():\n    from kvpo.low import LOW\n",
        "src/kvpo/named.py": "",
        "src/kvpo/other.py": "",
        "tests/conftest.py": "",
        "tests/shared.py": "from kvpo import high\n",
        "tests/test_one.py": "import tests.shared\nNAME = 'kvpo.named'\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "PLACES", {"kvpo": tmp_path / "src", "tests": tmp_path})
    monkeypatch.setattr(kept, "ALWAYS", (tmp_path / "tests" / "conftest.py",))

    def begin():
        for remembered in (kept.text_of, kept.imported_files, kept.rests_on):
            remembered.cache_clear()
        return kept.Kept(tmp_path / "kept")

    begin().write({"failure": None}, ["tests/test_one.py"], "a", "name")
    (tmp_path / "src/kvpo/other.py").write_text("new")
    assert begin().read("a", "name") == {"failure": None}
    assert begin().read("a", "nam", "e") is None
    for name in files.keys() - {"src/kvpo/other.py"}:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "# changed\n")
        assert begin().read("a", "name") is None, name
        (tmp_path / name).write_text(text)
    assert begin().read("a", "name") == {"failure": None}


def test_a_stopped_run_goes_on_with_what_is_not_kept(tmp_path, monkeypatch):
    run, kept = importlib.import_module("mutants"), importlib.import_module("kept")
    sample = mutants("LIMIT, MOST = 3, 4\n")
    tried = []

    def jobs(wanted, slots):
        for job in wanted:
            tried.append(job.mutant.key)
            yield job, {"failure": ["tests/benchmarks/test_mutants.py::one", "AssertionError"]}

    monkeypatch.setattr(run, "slots_in", lambda *_: [])
    monkeypatch.setattr(run, "record", lambda *_: run.Recorded({}, {}))
    monkeypatch.setattr(run, "run_jobs", jobs)
    monkeypatch.setattr(run, "PRELOADED", ())
    monkeypatch.setattr(run.gc, "freeze", lambda: None)
    for name in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "KVPO_GOLDEN"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setattr(kept, "text_of", lambda path: "")
    options = (["tests/benchmarks/test_mutants.py"], 1, kept.Kept(tmp_path))
    (stopped := run.run(sample, *options)).__next__()
    stopped.close()
    found = list(run.run(sample, *options))
    assert [mutant.key for mutant, _ in found] == tried == [mutant.key for mutant in sample]
    assert list(run.run(sample, *options)) == found and len(tried) == len(sample)
