"""What of a scheduler is decided before a job exists: its name, its options, and whether it needs an init image."""

import pytest

from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import Mode
from support.gateway import Server, as_base64, picture, wish

INVERTING = [name for name, spec in SCHEDULERS.items() if spec.needs_image]


@pytest.mark.parametrize("scheduler", INVERTING)
async def test_an_inversion_without_an_image_is_refused_before_a_job_exists(server: Server, scheduler: str) -> None:
    answer = await server.post(
        "controlnet", wish(init_image=None, control_image=as_base64(picture()), scheduler=scheduler)
    )
    assert answer["status"] == "error"
    assert f"The scheduler {scheduler!r} needs an init_image" in str(answer)
    assert server.backend.generated == []


@pytest.mark.parametrize("scheduler", INVERTING)
@pytest.mark.parametrize("strength", [None, 1, 0.5])
async def test_an_inversion_uses_the_image_at_every_strength(
    server: Server, scheduler: str, strength: float | None
) -> None:
    """Its noise is the image's own, so that strength 1 needs the image too."""
    answer = await server.post("controlnet", wish(scheduler=scheduler, strength=strength))
    assert answer["status"] == "success", answer
    task, with_init, _, _ = server.backend.generated[0]
    assert (task.mode, task.strength, with_init) == (Mode.IMAGE, strength or 1.0, True)


async def test_the_error_of_an_unknown_scheduler_is_the_only_one(server: Server) -> None:
    answer = await server.post("controlnet", wish(init_image=None, control_image=as_base64(picture()), scheduler="No"))
    assert "DDIMInverseScheduler" in str(answer)
    assert "needs an init_image" not in str(answer)


async def test_meta_says_which_options_the_scheduler_took(server: Server) -> None:
    for scheduler, spec in SCHEDULERS.items():
        answer = await server.post(
            "controlnet", wish(scheduler=scheduler, use_karras_sigmas="yes", algorithm_type="dpmsolver+++")
        )
        assert answer["status"] == "success", answer
        assert answer["meta"]["use_karras_sigmas"] == ("yes" if spec.karras else "no")
        assert answer["meta"]["algorithm_type"] == ("dpmsolver+++" if spec.algorithm_types else "none")
