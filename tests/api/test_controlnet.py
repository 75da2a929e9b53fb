"""``POST controlnet``: what clients send and get, from the documented sample to every mode."""

import asyncio
import base64
import io

import pytest
from PIL import Image

from serve_app.api.envelopes import FailedAnswer, ProcessingAnswer, SuccessAnswer
from serve_app.errors import JobError
from serve_app.tasks import Mode
from support.gateway import API, KEY, PUBLIC_URL, Open, Server, as_base64, picture, wish
from support.wire import SEED_META, seed_page_body


async def test_the_documented_sample_ends_in_a_picture(server: Server) -> None:
    answer = await server.post("controlnet", seed_page_body(KEY, "tiny", as_base64(picture())))
    SuccessAnswer.model_validate(answer)
    assert answer["status"] == "success"
    assert isinstance(answer["generationTime"], float)
    meta = answer["meta"]
    assert list(meta)[: len(SEED_META)] == SEED_META
    assert (meta["W"], meta["H"], meta["steps"], meta["n_samples"]) == (512, 512, 30, 1)
    assert meta["prompt"].startswith("a model doing photoshoot, ultra high resolution, 4K image, highly detailed")
    assert (meta["negative_prompt"], meta["mask_image"], meta["embeddings"], meta["lora"]) == ("", None, None, None)
    assert (meta["auto_hint"], meta["guess_mode"], meta["safetychecker"], meta["full_url"]) == ("yes", "no", "no", "no")
    assert (meta["guidance_scale"], meta["strength"]) == (7.5, 0.55)
    assert meta["seeds"] == [meta["seed"]]
    assert 0 <= meta["seed"] < 2**32
    assert meta["annotators"][0]["params"] == {"low_threshold": 100, "high_threshold": 200}
    assert answer["output"] == [f"{PUBLIC_URL}/generations/{meta['file_prefix']}-0.png"]
    assert answer["image_links"] == answer["proxy_links"] == answer["output"]
    file = await server.get(answer["output"][0])
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(file.content)).size == (512, 512)
    task = server.backend.generated[0][0]
    assert (task.mode, task.strength, task.controls[0].net) == (Mode.IMAGE, 0.55, "net-canny")


async def test_each_picture_has_its_seed(server: Server) -> None:
    answer = await server.post("controlnet", wish(samples="3", seed="4294967295"))
    assert answer["meta"]["seed"] == 4294967295
    assert answer["meta"]["seeds"] == [4294967295, 0, 1]
    assert len(set(answer["output"])) == 3


async def test_track_id_is_echoed_unchanged(server: Server) -> None:
    for track_id in (None, "", "null", 17, 1.5, True, "order 7", 10**300):
        answer = await server.post("controlnet", {**wish(), "track_id": track_id})
        assert answer["track_id"] == track_id
        assert type(answer["track_id"]) is type(track_id)


@pytest.mark.parametrize(
    ("changes", "mode", "init", "mask"),
    [
        ({}, Mode.TEXT, False, False),
        ({"strength": 1}, Mode.TEXT, False, False),
        ({"strength": "0.5"}, Mode.IMAGE, True, False),
        ({"mask_image": as_base64(picture())}, Mode.MASKED, True, True),
        ({"controlnet_model": "inpaint", "mask_image": as_base64(picture())}, Mode.MASKED, True, True),
        ({"init_image": None, "control_image": as_base64(picture()), "strength": 0.5}, Mode.TEXT, False, False),
    ],
)
async def test_what_is_sent_decides_the_mode(
    server: Server, changes: dict[str, object], mode: Mode, init: bool, mask: bool
) -> None:
    answer = await server.post("controlnet", wish(**changes))
    assert answer["status"] == "success", answer
    task, with_init, with_mask, maps = server.backend.generated[0]
    assert (task.mode, with_init, with_mask, maps) == (mode, init, mask, 1)


async def test_several_nets_with_values_of_their_own(server: Server) -> None:
    answer = await server.post(
        "controlnet",
        wish(
            controlnet_model="canny, tile",
            controlnet_conditioning_scale="0.5,1.5",
            control_guidance_start=[0, 0.25],
            control_guidance_end="0.75",
            control_image=[as_base64(picture(8, 8)), f"data:image/png;base64,{as_base64(picture(16, 16))}"],
        ),
    )
    assert answer["status"] == "success", answer
    first, second = server.backend.generated[0][0].controls
    assert (first.net, first.scale, first.start, first.end) == ("net-canny", 0.5, 0.0, 0.75)
    assert (second.net, second.scale, second.start, second.end) == ("net-tile", 1.5, 0.25, 0.75)
    assert answer["meta"]["controlnet_model"] == "canny,tile"
    assert answer["meta"]["controlnet_conditioning_scale"] == [0.5, 1.5]


async def test_one_control_image_serves_all_nets_but_inpaint(server: Server) -> None:
    await server.post(
        "controlnet",
        wish(
            controlnet_model=["canny", "inpaint"],
            control_image=as_base64(picture()),
            mask_image=as_base64(picture()),
            auto_hint="no",
            instant_response="yes",
        ),
    )
    (job,) = server.resources.jobs.list("studio", 1)
    assert job.spec.control_sources == ("control_image.0", "init_image")
    assert [control.auto_hint for control in job.spec.task.controls] == [False, True]


async def test_a_built_in_id_ignores_another_type(server: Server) -> None:
    answer = await server.post("controlnet", wish(controlnet_type="canny,scribble"))
    assert answer["status"] == "success"
    assert answer["meta"]["controlnet_type"] == "canny"


async def test_a_loaded_net_takes_the_annotator_of_its_type(server: Server) -> None:
    answer = await server.post("controlnet", wish(controlnet_model="mine,canny", controlnet_type="tile"))
    assert answer["status"] == "success", answer
    assert [(c.net, c.control_type) for c in server.backend.generated[0][0].controls] == [
        ("mine", "tile"),
        ("net-canny", "canny"),
    ]


async def test_a_published_net_knows_its_type(server: Server) -> None:
    answer = await server.post("controlnet", wish(model_id="other", controlnet_model="xl-canny"))
    assert answer["status"] == "success", answer
    assert answer["meta"]["controlnet_type"] == "canny"


async def test_a_control_map_of_ones_own_needs_no_annotator(server: Server) -> None:
    answer = await server.post("controlnet", wish(controlnet_model="depth", auto_hint="no"))
    assert answer["status"] == "success", answer
    assert server.backend.annotated[0].auto_hint is False


async def test_guess_mode_needs_no_prompt(server: Server) -> None:
    answer = await server.post("controlnet", wish(prompt="", guess_mode="yes", enhance_prompt="yes"))
    assert answer["status"] == "success", answer
    assert answer["meta"]["prompt"] == ""


async def test_prompt_enhancement(server: Server) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "a lighthouse"),
        ({"enhance_prompt": "yes"}, "a lighthouse, highly detailed, sharp focus, professional photography"),
        ({"enhance_style": "isometric"}, "a lighthouse, isometric view, clean geometry"),
        ({"enhance_prompt": "yes", "enhance_style": "isometric"}, "a lighthouse, isometric view, clean geometry"),
        ({"enhance_prompt": "no", "enhance_style": "isometric"}, "a lighthouse"),
    ]
    for changes, prompt in cases:
        answer = await server.post("controlnet", wish(**changes))
        assert answer["meta"]["prompt"] == prompt
        assert server.backend.generated[-1][0].prompt == prompt


async def test_hosted_defaults_enhance_the_prompt(open_server: Open) -> None:
    async with open_server(compat={"hosted_defaults": True}) as server:
        assert "highly detailed" in (await server.post("controlnet", wish()))["meta"]["prompt"]
        assert (await server.post("controlnet", wish(enhance_prompt="no")))["meta"]["prompt"] == "a lighthouse"


async def test_what_is_not_done_is_told_in_meta(server: Server) -> None:
    answer = await server.post(
        "controlnet", wish(tomesd="yes", multi_lingual="yes", safety_checker="yes", loadbalancer={"any": ["thing"]})
    )
    meta = answer["meta"]
    assert (meta["tomesd"], meta["multi_lingual"], meta["safetychecker"]) == ("no", "no", "no")
    assert answer["nsfw_content_detected"] is None


async def test_scheduler_options_are_effective_values(server: Server) -> None:
    answer = await server.post(
        "controlnet",
        wish(scheduler="DPMSolverMultistepScheduler", algorithm_type="dpmsolver+++", use_karras_sigmas="no"),
    )
    assert (answer["meta"]["algorithm_type"], answer["meta"]["use_karras_sigmas"]) == ("dpmsolver+++", "no")
    answer = await server.post("controlnet", wish(scheduler="DDIMScheduler", algorithm_type="dpmsolver++"))
    assert (answer["meta"]["algorithm_type"], answer["meta"]["use_karras_sigmas"]) == ("none", "no")


@pytest.mark.parametrize(("body", "headers"), [({"instant_response": "yes"}, {}), ({}, {"Prefer": "respond-async"})])
async def test_an_instant_answer_is_processing(
    server: Server, body: dict[str, object], headers: dict[str, str]
) -> None:
    server.backend.gate.clear()
    answer = await server.post("controlnet", wish(**body), **headers)
    ProcessingAnswer.model_validate(answer)
    assert answer["status"] == "processing"
    assert isinstance(answer["eta"], int)
    assert answer["eta"] >= 1
    assert answer["message"] == answer["messege"]
    assert answer["fetch_result"] == f"{PUBLIC_URL}{API}/fetch/{answer['id']}"
    assert answer["output"] == []
    (link,) = answer["future_links"]
    assert (await server.get(link)).status_code == 404
    server.backend.gate.set()
    assert (await server.status(answer["id"], "success"))["output"] == [link]


async def test_a_slow_job_is_answered_in_time(open_server: Open) -> None:
    async with open_server(server={"sync_wait_s": 0.2}) as server:
        server.backend.gate.clear()
        assert (await server.post("controlnet", wish()))["status"] == "processing"


async def test_a_client_that_hangs_up_cancels_nothing(server: Server) -> None:
    server.backend.gate.clear()
    call = asyncio.create_task(server.post("controlnet", wish()))
    await server.started()
    call.cancel()
    server.backend.gate.set()
    (job,) = server.resources.jobs.list("studio", 1)
    await server.status(job.id, "success")


async def test_a_job_that_cannot_be_done_is_failed(server: Server) -> None:
    server.backend.failure = JobError("The model is broken.")
    answer = await server.post("controlnet", wish())
    FailedAnswer.model_validate(answer)
    assert (answer["status"], answer["message"], answer["output"]) == ("failed", "The model is broken.", "")


async def test_a_link_that_cannot_be_fetched_fails_the_job_naming_the_field(open_server: Open) -> None:
    async with open_server(fetch={"allow_hosts": ["127.0.0.1"]}) as server:
        answer = await server.post("controlnet", wish(init_image="http://127.0.0.1:9/a.png"))
    assert answer["status"] == "failed"
    assert "Unable to fetch image from provided URL" in answer["message"]
    assert "init_image" in answer["message"]


async def test_a_webhook_that_cannot_be_delivered_does_no_harm(server: Server) -> None:
    for webhook in ("https://stablediffusionapi.com", "http://127.0.0.1/hook", "\udead\0", "x" * 9000, 5):
        answer = await server.post("controlnet", {**wish(), "webhook": webhook})
        assert answer["status"] == "success", answer


async def test_base64_serves_text(server: Server) -> None:
    answer = await server.post("controlnet", wish(base64="yes"))
    file = await server.get(answer["output"][0])
    assert file.headers["content-type"].startswith("text/plain")
    assert base64.b64decode(file.text).startswith(b"\x89PNG")


async def test_meta_shows_a_link_as_sent_and_never_the_data(open_server: Open) -> None:
    link = "http://127.0.0.1:9/a,b.png"
    async with open_server(fetch={"allow_hosts": ["127.0.0.1"]}) as server:
        answer = await server.post(
            "controlnet", wish(init_image=link, control_image=f"{link},{link}", controlnet_model="canny,tile",
                               mask_image=as_base64(picture()), instant_response="yes"),
        )  # fmt: skip
    meta = answer["meta"]
    assert (meta["init_image"], meta["control_image"]) == (link, [link, link])
    assert meta["mask_image"] == f"{PUBLIC_URL}/inputs/{meta['file_prefix']}-mask_image"


async def test_a_long_prompt_is_not_cut(server: Server) -> None:
    prompt = "word " * 2000
    assert (await server.post("controlnet", wish(prompt=prompt)))["meta"]["prompt"] == prompt


async def test_text_of_any_script_survives(server: Server) -> None:
    prompt = "ein Löwe 🦁 在海边"
    assert (await server.post("controlnet", wish(prompt=prompt)))["meta"]["prompt"] == prompt


@pytest.mark.parametrize("pictures", [["{}", ""], ["{}", None], ["null", "{}"], "{},", [" {}\n"]])
async def test_empty_control_images_are_not_given(server: Server, pictures: list[str | None] | str) -> None:
    sent = as_base64(picture())
    filled = pictures.format(sent) if isinstance(pictures, str) else [part and part.format(sent) for part in pictures]
    answer = await server.post("controlnet", wish(controlnet_model="canny,tile", control_image=filled))
    assert answer["status"] == "success", answer
    assert len(answer["meta"]["control_image"]) == 1
