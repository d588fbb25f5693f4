"""``kvpo arena``: opens and serves a study of blind comparisons, and analyses its votes."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpo.app.arena_sources import arms_of, described, parse_source, scenes_of
from kvpo.arena.database import DATABASE
from kvpo.arena.exchange import VOTE_SUFFIXES, read_votes, write_votes
from kvpo.arena.intake import create_study, refuse_taken
from kvpo.arena.pairs import draw
from kvpo.arena.report import write_study_page
from kvpo.arena.result import Result, analyse
from kvpo.arena.store import Study
from kvpo.arena.study import Design, read_questions
from kvpo.config_checks import ConfigurationError
from kvpo.files import finite, write_json
from kvpo.serving import listener, run_app, url_of

logger = logging.getLogger(__name__)


def open_study(
    sources: Sequence[str],
    out: Path | None = None,
    *,
    prompts: Path | None = None,
    questions: Path | None = None,
    pairs: int | None = None,
    ranked: bool = False,
) -> Study:
    """Create a study of these sources, or open an existing one and check its videos against their digests.

    Args:
        sources: arms as ``parse_source`` reads them, or the directory of a single study.
        out: directory of the study; by default ``arena/NAME-NAME``. An existing study there is continued.
        prompts: prompts that runs generate and that the videos of folders show. By default, runs take test
            prompts of the first run, and folders the manifest that `kvpo generate` writes.
        questions: a YAML file with a custom ``title``, ``instructions`` or ``questions``.
        pairs: maximum number of pairs, or rankings, per rater, and of prompts that runs generate; None: 20.
        ranked: rank all videos of a prompt at once.

    Raises:
        ValueError: sources that cannot be used or compared, or the study there has other sources, pairs or
            questions.
        StorageError: ``out`` cannot be written.
    """
    if pairs is not None and pairs < 1:
        raise ConfigurationError(f"--pairs: must be 1 or more, got {pairs}")
    own = {} if questions is None else read_questions(questions)
    own |= {} if pairs is None else {"pairs": pairs}
    if len(sources) == 1 and (Path(sources[0]) / DATABASE).is_file():
        return _continued(Study(Path(sources[0])), own)
    given = [parse_source(text) for text in sources]
    directory = out or Path("arena") / "-".join(dict.fromkeys(one.name for one in given))
    asked = described(given, prompts, ranked)
    if (directory / DATABASE).is_file():
        study = Study(directory)
        if study.design.sources != asked:
            raise ValueError(
                f"{directory} is a study of other sources ({study.design.sources}); choose another --out, or "
                f"continue it: kvpo arena {directory}"
            )
        return _continued(study, own)
    refuse_taken(directory)
    with tempfile.TemporaryDirectory() as folder:
        arms = arms_of(given, prompts, own.get("pairs", Design.pairs), Path(folder))
        scenes, videos = scenes_of(arms, Path(folder))
        fields = {"title": "Which video is better?"} | own
        design = Design(**fields, scenes=tuple(scenes), ranked=ranked, sources=asked)
        return create_study(directory, design, videos)


def _continued(study: Study, asked: Mapping[str, Any]) -> Study:
    """A study with unchanged videos. Raises ValueError, also if its design has not what is ``asked`` for."""
    for name, value in asked.items():
        if vars(study.design)[name] != value:
            raise ConfigurationError(
                f"--{'pairs' if name == 'pairs' else 'questions'}: {study.directory} has its {name} already; "
                "leave it out, or choose another --out"
            )
    study.check_videos()
    return study


def links(study: Study, raters: Sequence[str], url: str) -> list[str]:
    """Invite raters and return a line with the link of each. Raises ValueError for invalid names."""
    return [f"{rater}: {url}/#{study.invite(rater)}" for rater in raters]


def serve_study(opened: Callable[[], Study], raters: Sequence[str], *, host: str, port: int) -> None:
    """Serve a study to the raters until SIGTERM or Ctrl-C; every request needs one of their tokens.

    Binds the address before opening the study, which may first have to generate its videos.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    from kvpo.arena.server import arena_app

    with listener(host, port) as listening:
        study = opened()
        for line in links(study, raters, url_of(host, listening.getsockname()[1])):
            logger.info("%s", line)
        logger.info("results: kvpo arena report %s --close", study.directory)
        run_app(arena_app(study), listening)


def report(place: Path, *, effect: float = 0.1, close: bool = False) -> tuple[Path, Result]:
    """Analyse a study, or a file of votes, and write its page and numbers beside it.

    Until a study is closed, its report calls the arms by letters.

    Args:
        effect: the smallest (G - B) / (G + S + B) that matters; decides how many votes are still needed.
        close: stop accepting votes, and name the arms.

    Raises:
        ValueError: no study or votes there; an effect outside (0, 1].
        StorageError: the page cannot be written.
    """
    if not 0 < effect <= 1:
        raise ConfigurationError(f"--effect: must be above 0 and at most 1, got {effect}")
    if place.suffix in VOTE_SUFFIXES:
        result = analyse(place.stem, read_votes(place), [], effect=effect)
        # The numbers go beside the page, as .json, where votes in that form may be.
        page = place.with_suffix(".report.html" if place.suffix == ".json" else ".html")
        return _written(result, page, {}), result
    study = Study(place)
    study.check_videos()
    if close:  # before the votes are read, so that the last report counts every one
        study.close()
    judgements, rankings, design = study.judgements(), study.rankings(), study.design
    names = {arm: arm for arm in design.arms} if study.closed else masks(study)
    result = analyse(
        design.title,
        judgements,
        rankings,
        effect=effect,
        questions=design.questions,
        names=names,
        closed=study.closed,
    )
    videos = {digest: study.video_path(digest) for scene in design.scenes for digest in scene.videos.values()}
    return _written(result, place / "report.html", videos), result


def _written(result: Result, page: Path, videos: Mapping[str, Path]) -> Path:
    write_study_page(page, result, videos)
    write_json(page.with_suffix(".json"), finite(asdict(result)), ensure_ascii=False)
    return page


def masks(study: Study) -> dict[str, str]:
    """Arm -> the letter that stands for it while the study is open, in an order drawn by the study's key."""
    drawn = sorted(study.design.arms, key=lambda arm: draw(study.key, "mask", arm))
    return {arm: f"arm {chr(ord('A') + n)}" if n < 26 else f"arm {n + 1}" for n, arm in enumerate(drawn)}


def export_votes(study: Study, out: Path) -> int:
    """Write a closed study's votes and return the number of answers.

    Raises:
        ValueError: the study is open, the suffix of ``out`` is unknown, or an extra is not installed.
    """
    if not study.closed:
        raise ValueError(
            f"{study.directory}: names stay hidden until the study is closed: kvpo arena report "
            f"{study.directory} --close"
        )
    votes = study.judgements()
    write_votes(out, votes)
    return len(votes)
