"""Serves the rating page. Every request sends an invitation's token and sees only that rater's ballots.

No response reveals which arm a video comes from: videos are addressed by the rater's ballot and side.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

from kvpo.arena.database import VoteRefused
from kvpo.arena.pairs import Ballot
from kvpo.arena.store import Rater, Study, Vote
from kvpo.extras import extra
from kvpo.files import StorageError
from kvpo.serving import add_page, is_own_page, page_headers

with extra("server"):
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

LARGEST_BODY = 16 * 1024
"""Most bytes of a request body; a vote takes a few hundred."""
A_DAY = 24 * 3600 * 1000
"""Most milliseconds that a ballot may be reported to have taken."""
AHEAD = 2
"""Ballots served beyond the one that is due: the next one, and one more after a vote was undone."""


class SentVote(BaseModel):
    """The body of a vote."""

    model_config = ConfigDict(extra="forbid", strict=True)
    position: int = Field(ge=0)
    answers: dict[str, str] = {}
    ranking: list[int] = []
    milliseconds: int = Field(default=0, ge=0, le=A_DAY)
    finished: bool = False


def arena_app(study: Study) -> FastAPI:
    """Build the application that serves a study to its raters."""
    app = FastAPI(title="kvpo arena", openapi_url=None)
    app.middleware("http")(_guarded)
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(VoteRefused, _refused)
    app.add_exception_handler(StorageError, _unstored)

    def rater(
        shown: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Rater:
        found = None if shown is None else study.rater_of(shown.credentials)
        if found is None:
            raise HTTPException(401, "open the link of your invitation", {"WWW-Authenticate": "Bearer"})
        return found

    voter = Annotated[Rater, Depends(rater)]
    add_page(app, "kvpo.arena")
    _show(app, study, voter)
    _take_votes(app, study, voter)
    return app


def _show(app: FastAPI, study: Study, voter: Any) -> None:
    """Add the routes that show a rater the ballots and videos."""

    @app.get("/session")
    def session(who: voter) -> dict[str, Any]:
        design = study.design
        return {
            "title": design.title,
            "instructions": design.instructions,
            "ranked": design.ranked,
            "questions": [asdict(one) for one in design.asked],
            "rater": who.name,
            "ballots": len(study.ballots_of(who)),
            "done": study.done(who),
            "closed": study.closed,
        }

    @app.get("/ballots/{position}")
    def ballot(position: int, who: voter) -> dict[str, Any]:
        shown = _ballot(study, who, position)
        scene = study.design.scenes[shown.scene]
        return {
            "position": position,
            "ranked": shown.kind == "ranking",
            "videos": len(shown.videos),
            "prompts": scene.segments,
            "starts": scene.starts,
            "rate": scene.rate,
            "questions": study.design.asked_about(scene),
        }

    @app.get("/ballots/{position}/videos/{place}")
    def video(position: int, place: int, who: voter) -> FileResponse:
        shown = _ballot(study, who, position)
        if not 0 <= place < len(shown.videos):
            raise HTTPException(404, f"ballot {position} has {len(shown.videos)} videos")
        return FileResponse(study.video_path(shown.videos[place]), media_type="video/mp4")


def _take_votes(app: FastAPI, study: Study, voter: Any) -> None:
    """Add the routes that store and undo votes."""

    @app.post("/votes")
    def vote(sent: SentVote, who: voter) -> dict[str, int]:
        given = Vote(sent.position, sent.answers, tuple(sent.ranking), sent.milliseconds, sent.finished)
        study.vote(who, given)
        return {"done": study.done(who)}

    @app.post("/undo")
    def undo(who: voter) -> dict[str, int]:
        study.undo(who)
        return {"done": study.done(who)}


def _ballot(study: Study, who: Rater, position: int) -> Ballot:
    """A ballot that the rater may see: any up to the one that is due, and a few that are loaded ahead."""
    shown = study.ballots_of(who)
    if not 0 <= position < len(shown) or position > study.done(who) + AHEAD:
        raise HTTPException(404, f"there is no ballot {position} for you now")
    return shown[position]


async def _unreadable(request: Request, error: Exception) -> Response:
    """Report a request's first error in one line, without its content, which JSON may be unable to hold."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])).encode("ascii", "backslashreplace").decode()[:90]
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 409)


async def _unstored(request: Request, error: Exception) -> Response:
    """Tell the rater to try again, and the operator, in one line, why the database cannot be used."""
    logger.error("%s", error)
    return JSONResponse({"detail": "The study cannot store anything right now. Try again in a moment."}, 503)


async def _guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse requests from other pages and too large ones; add the security headers to every response."""
    refused = _refusal(request)
    response = JSONResponse({"detail": refused[1]}, refused[0]) if refused else await call_next(request)
    response.headers.update(page_headers("media-src blob:; img-src data:"))
    return response


def _refusal(request: Request) -> tuple[int, str] | None:
    if not is_own_page(request.headers.get("origin"), request.headers.get("host", "")):
        return 403, "requests of other pages are not answered"
    if request.method == "POST":
        length = request.headers.get(
            "content-length", "0" if request.headers.get("transfer-encoding") is None else ""
        )
        if not length.isdecimal():
            return 411, "the length of the body must be declared"
        if int(length) > LARGEST_BODY:
            return 413, f"{int(length):,} bytes are over the limit of {LARGEST_BODY:,}"
    return None
