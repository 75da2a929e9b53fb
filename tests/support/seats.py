"""Pictures of requests that just joined, as a forward takes them."""

from serve_app.engine.encode import prepare
from serve_app.engine.prompts import PromptEncoder
from serve_app.engine.request import Seat
from serve_app.tasks import GenerationTask
from support.tiny import Zoo, request


def seats(zoo: Zoo, *wanted: GenerationTask) -> list[Seat]:
    """A seat for every picture."""
    prompts = PromptEncoder()
    joined = [prepare(request(zoo, one), prompts, 0) for one in wanted]
    return [
        Seat(running, picture, picture.call)
        for running in joined
        for picture in running.pictures
        if picture.call is not None
    ]


def no_beat() -> None:
    """For forwards that nobody watches."""
