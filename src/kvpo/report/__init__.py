"""The report floor: one self-contained HTML page per run, and video files."""

from pathlib import Path


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run has left there so far, and return its path.

    Only ``config.yaml`` and ``metrics.jsonl`` must exist; anything else missing or unreadable is named on the
    page. Raises ValueError if ``run_dir`` is not a run directory.
    """
    from kvpo.report.page import render_report

    return render_report(Path(run_dir))
