"""CONTROL_TYPES: what a ControlNet can be guided by. Strings only: no torch, no detector import here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.errors import one_of


@dataclass(frozen=True, slots=True)
class ControlType:
    """One row.

    ``annotator`` is a name in ``serve_app.annotators.ANNOTATORS`` or None while no detector is served for it;
    ``missing`` then says what it would take. ``nets`` names the usual ControlNet per base family, for messages.
    """

    annotator: str | None
    nets: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    needs_mask: bool = False
    lines: bool = False
    """The map holds thin lines, poses or flat colours: a sent map is resized without inventing levels between them."""
    union: int | None = None
    """Index of this control in a ControlNet-Union (xinsir/controlnet-union-sdxl-1.0 and its promax version)."""


_SD15 = "lllyasviel/control_"

CONTROL_TYPES: Mapping[str, ControlType] = {
    "canny": ControlType(
        "canny",
        {
            "sd15": _SD15 + "v11p_sd15_canny",
            "sd21": "thibaud/controlnet-sd21-canny-diffusers",
            "sdxl": "xinsir/controlnet-canny-sdxl-1.0",
        },
        lines=True,
        union=3,
    ),
    "depth": ControlType(
        None,
        {
            "sd15": _SD15 + "v11f1p_sd15_depth",
            "sd21": "thibaud/controlnet-sd21-depth-diffusers",
            "sdxl": "xinsir/controlnet-depth-sdxl-1.0",
        },
        missing="the weights depth-anything/Depth-Anything-V2-Small-hf",
        union=1,
    ),
    "hed": ControlType(None, {"sd15": _SD15 + "v11p_sd15_softedge"}, missing="the weights ControlNetHED.pth", union=2),
    "mlsd": ControlType(
        None, {"sd15": _SD15 + "v11p_sd15_mlsd"}, missing="the weights mlsd_large_512_fp32.pth", lines=True, union=3
    ),
    "normal": ControlType(None, {"sd15": _SD15 + "v11p_sd15_normalbae"}, missing="the weights scannet.pt", union=4),
    "openpose": ControlType(
        None,
        {
            "sd15": _SD15 + "v11p_sd15_openpose",
            "sd21": "thibaud/controlnet-sd21-openposev2-diffusers",
            "sdxl": "xinsir/controlnet-openpose-sdxl-1.0",
        },
        missing="the weights body_pose_model.pth",
        lines=True,
        union=0,
    ),
    "scribble": ControlType(
        "xdog",
        {"sd15": _SD15 + "v11p_sd15_scribble", "sdxl": "xinsir/controlnet-scribble-sdxl-1.0"},
        lines=True,
        union=2,
    ),
    "segmentation": ControlType(
        None,
        {"sd15": _SD15 + "v11p_sd15_seg"},
        missing="the weights openmmlab/upernet-convnext-small",
        lines=True,
        union=5,
    ),
    "aesthetic-controlnet": ControlType("canny", {"sd21": "krea/aesthetic-controlnet"}, lines=True),
    "inpaint": ControlType("inpaint", {"sd15": _SD15 + "v11p_sd15_inpaint"}, needs_mask=True, union=7),
    "softedge": ControlType(
        None, {"sd15": _SD15 + "v11p_sd15_softedge"}, missing="the weights table5_pidinet.pth", union=2
    ),
    "lineart": ControlType("lineart_standard", {"sd15": _SD15 + "v11p_sd15_lineart"}, lines=True, union=3),
    "shuffle": ControlType("shuffle", {"sd15": _SD15 + "v11e_sd15_shuffle"}),
    "tile": ControlType(
        "tile", {"sd15": _SD15 + "v11f1e_sd15_tile", "sdxl": "xinsir/controlnet-tile-sdxl-1.0"}, union=6
    ),
    "face_detector": ControlType(
        None, {"sd15": "CrucibleAI/ControlNetMediaPipeFace"}, missing="the model file face_landmarker.task", lines=True
    ),
    "qrcode": ControlType("tile", {"sd15": "monster-labs/control_v1p_sd15_qrcode_monster"}, lines=True),
    "lineart_anime": ControlType(
        None, {"sd15": _SD15 + "v11p_sd15s2_lineart_anime"}, missing="the weights netG.pth", lines=True, union=3
    ),
}


UNION = "union"
"""In place of a control type: a ControlNet-Union, which is told its types with each request."""


def union_control_types(count: int) -> tuple[str, ...]:
    """Control types that a ControlNet-Union of ``count`` types (its ``num_control_type``) knows."""
    return tuple(name for name, row in CONTROL_TYPES.items() if row.union is not None and row.union < count)


def annotatable_types() -> tuple[str, ...]:
    """Control types whose map this version can make from a photo."""
    return tuple(name for name, row in CONTROL_TYPES.items() if row.annotator)


def control_type_problem(name: str, auto_hint: bool) -> str | None:
    """Why ``name`` can't be used, as a message for the client, or None.

    With ``auto_hint`` off the image already is the control map, so no annotator is needed.
    """
    row = CONTROL_TYPES.get(name)
    if row is None:
        return one_of("controlnet_type", name, tuple(CONTROL_TYPES))
    if auto_hint and row.annotator is None:
        return (
            f"The annotator of {name!r} is not available: it needs {row.missing}. Send the control map itself with "
            f"auto_hint: no, or use one of: {', '.join(annotatable_types())}."
        )
    return None
