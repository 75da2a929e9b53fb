"""``POST controlnet`` for other families: which net a name means, what a union net knows, how large pictures may be."""

from typing import Any

from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from support.gateway import KEY, Open, Server, as_base64, picture, wish


def add(catalog: Catalog, name: str, **changes: Any) -> None:
    values: dict[str, Any] = {"type": ModelType.CONTROLNET, "family": "sdxl", "location": f"/nowhere/{name}"}
    catalog.add(ModelEntry(id=name, hash=name.ljust(64, "0"), size_bytes=1, **values | changes))


def add_unions(catalog: Catalog) -> None:
    """Beside ``xl-canny``, the dedicated net of ``other``'s family."""
    add(catalog, "union", control_type="union", union_types=6)
    add(catalog, "promax", control_type="union", union_types=8)


async def refused(server: Server, **changes: object) -> dict[str, Any]:
    answer = await server.post("controlnet", wish(model_id="other", **changes))
    assert answer["status"] == "error", answer
    messages: dict[str, Any] = answer["message"]
    return messages


async def drawn(server: Server, **changes: object) -> list[tuple[str, str]]:
    """Net and control type of each control of the task that the GPUs got."""
    before = len(server.backend.generated)
    answer = await server.post("controlnet", wish(model_id="other", **changes))
    assert answer["status"] == "success", answer
    task = server.backend.generated[before][0]
    return [(control.net, control.control_type) for control in task.controls]


async def test_built_in_ids_mean_a_dedicated_net_else_a_union_net(server: Server) -> None:
    add_unions(server.resources.catalog)
    assert await drawn(server, controlnet_model="canny,lineart,tile") == [
        ("xl-canny", "canny"),
        ("union", "lineart"),
        ("promax", "tile"),
    ]
    assert await drawn(server, controlnet_model="scribble,lineart") == [("union", "scribble"), ("union", "lineart")]
    messages = await refused(server, controlnet_model="shuffle")
    assert "No ControlNet for 'shuffle' is loaded for the family 'sdxl'" in messages["controlnet_model"][0]
    assert "tile" in messages["controlnet_model"][0].partition("Allowed: ")[2]


async def test_a_union_net_by_its_id_needs_the_types(server: Server) -> None:
    add_unions(server.resources.catalog)
    nets = "promax,promax"
    both = await drawn(server, controlnet_model=nets, controlnet_type="canny,tile")
    assert both == [("promax", "canny"), ("promax", "tile")]
    assert await drawn(server, controlnet_model="union", controlnet_type="lineart") == [("union", "lineart")]

    messages = await refused(server, controlnet_model="promax")
    assert messages["controlnet_type"][0].startswith("The controlnet_type field is required with 'promax'. Allowed: ")
    messages = await refused(server, controlnet_model="union", controlnet_type="tile")
    assert messages["controlnet_type"][0].startswith("'union' knows no 'tile'. Allowed: canny, depth, ")
    assert "tile" not in messages["controlnet_type"][0].partition("Allowed: ")[2]
    messages = await refused(server, controlnet_model="promax", controlnet_type="union")
    assert "'union' is unknown" in messages["controlnet_type"][0]


async def test_a_union_net_of_another_family_is_refused(server: Server) -> None:
    add_unions(server.resources.catalog)
    answer = await server.post("controlnet", wish(controlnet_model="promax", controlnet_type="canny"))
    (message,) = answer["message"]["controlnet_model"]
    assert "'promax' is of the family 'sdxl', the model_id 'tiny' of 'sd15'" in message
    assert server.backend.touched == 0


async def test_the_list_of_models_says_what_nets_know(server: Server) -> None:
    add_unions(server.resources.catalog)
    answer = await server.post("get_all_models", {"key": KEY})
    listed = {model["model_id"]: model for model in answer["models"]}
    assert listed["union"]["control_type"] == "union"
    assert set(listed["promax"]["control_types"]) - set(listed["union"]["control_types"]) == {"tile", "inpaint"}
    assert listed["xl-canny"]["control_types"] == ["canny"]
    assert listed["other"]["control_types"] == []
    assert (await server.post("verify_model", {"key": KEY, "model_id": "union"}))["status"] == "success"


async def test_each_family_has_its_sizes(open_server: Open) -> None:
    limits = {"max_width": 512, "families": {"sdxl": {"max_width": 1536, "max_height": 768}}}
    async with open_server(limits=limits) as server:
        assert await drawn(server, controlnet_model="xl-canny", width=1536, height=640)
        messages = await refused(server, controlnet_model="xl-canny", width=1544, height=776)
        assert "from 64 to 1536, a multiple of 8, got 1544" in messages["width"][0]
        assert "from 64 to 768" in messages["height"][0]
        answer = await server.post("controlnet", wish(width=520, height=1024))
        assert list(answer["message"]) == ["width"]
        assert "from 64 to 512" in answer["message"]["width"][0]


async def test_a_model_that_only_repaints_needs_a_mask(server: Server) -> None:
    add(server.resources.catalog, "painter", type=ModelType.BASE, family="sd15", inpaints=True)
    answer = await server.post("controlnet", wish(model_id="painter"))
    assert answer["message"] == {
        "mask_image": ["The mask_image field is required: the model_id 'painter' only repaints."]
    }
    masked = wish(model_id="painter", mask_image=as_base64(picture()))
    assert (await server.post("controlnet", masked))["status"] == "success"


async def test_clip_skip_is_held_against_the_model(server: Server) -> None:
    add(server.resources.catalog, "shallow", type=ModelType.BASE, family="sd15", max_clip_skip=2)
    answer = await server.post("controlnet", wish(model_id="shallow", clip_skip=3))
    assert answer["message"] == {"clip_skip": ["The clip_skip field must be a whole number from 1 to 2, got 3."]}
    assert (await server.post("controlnet", wish(model_id="shallow", clip_skip="2")))["status"] == "success"
