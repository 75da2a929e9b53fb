"""CONTROL_TYPES: what a ControlNet can be guided by. Strings only: no torch, no detector import here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.errors import one_of


@dataclass(frozen=True, slots=True)
class ControlType:
    """One row.

    ``annotator`` is the default, a name in ``serve_app.annotators.ANNOTATORS``, and ``choices`` are the others that
    make maps for this type. The default is fixed: where its weights are missing, that is an error, because another
    detector would draw another picture. Types that have a good annotator without weights have it as their default.
    ``nets`` names the usual ControlNet per base family, for messages.
    """

    annotator: str
    nets: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    needs_mask: bool = False
    lines: bool = False
    """The map holds thin lines, poses or flat colours: a sent map is resized without inventing levels between them."""
    union: int | None = None
    """Index of this control in a ControlNet-Union (xinsir/controlnet-union-sdxl-1.0 and its promax version)."""

    @property
    def annotators(self) -> tuple[str, ...]:
        """Every name that a request may choose, the default first. ``none``: the picture already is the map."""
        return (self.annotator, *self.choices, *(() if self.needs_mask else ("none",)))


_SD15 = "lllyasviel/control_"
_SD21 = "thibaud/controlnet-sd21-"
_SDXL_UNION = "xinsir/controlnet-union-sdxl-1.0"
_SDXL_PROMAX = f"{_SDXL_UNION} (its promax version)"

CONTROL_TYPES: Mapping[str, ControlType] = {
    "canny": ControlType(
        "canny",
        {
            "sd15": _SD15 + "v11p_sd15_canny",
            "sd21": _SD21 + "canny-diffusers",
            "sdxl": "xinsir/controlnet-canny-sdxl-1.0",
        },
        choices=("invert",),
        lines=True,
        union=3,
    ),
    "depth": ControlType(
        "depth_anything_v2",
        {
            "sd15": _SD15 + "v11f1p_sd15_depth",
            "sd21": _SD21 + "depth-diffusers",
            "sdxl": "xinsir/controlnet-depth-sdxl-1.0",
        },
        choices=("midas", "zoe", "leres"),
        union=1,
    ),
    "hed": ControlType(
        "hed",
        {"sd15": _SD15 + "v11p_sd15_softedge", "sd21": _SD21 + "hed-diffusers", "sdxl": _SDXL_UNION},
        union=2,
    ),
    "mlsd": ControlType("mlsd", {"sd15": _SD15 + "v11p_sd15_mlsd", "sdxl": _SDXL_UNION}, lines=True, union=3),
    "normal": ControlType(
        "normal_bae",
        {"sd15": _SD15 + "v11p_sd15_normalbae", "sd21": _SD21 + "normalbae-diffusers", "sdxl": _SDXL_UNION},
        union=4,
    ),
    "openpose": ControlType(
        "openpose_body",
        {
            "sd15": _SD15 + "v11p_sd15_openpose",
            "sd21": _SD21 + "openposev2-diffusers",
            "sdxl": "xinsir/controlnet-openpose-sdxl-1.0",
        },
        choices=("openpose_hand", "openpose_face", "openpose_full"),
        lines=True,
        union=0,
    ),
    "scribble": ControlType(
        "xdog",
        {
            "sd15": _SD15 + "v11p_sd15_scribble",
            "sd21": _SD21 + "scribble-diffusers",
            "sdxl": "xinsir/controlnet-scribble-sdxl-1.0",
        },
        choices=("scribble_pidinet", "scribble_hed", "invert"),
        lines=True,
        union=2,
    ),
    "segmentation": ControlType(
        "upernet",
        {"sd15": _SD15 + "v11p_sd15_seg", "sd21": _SD21 + "ade20k-diffusers", "sdxl": _SDXL_UNION},
        lines=True,
        union=5,
    ),
    "aesthetic-controlnet": ControlType("canny", {"sd21": "krea/aesthetic-controlnet"}, lines=True),
    "inpaint": ControlType(
        "inpaint", {"sd15": _SD15 + "v11p_sd15_inpaint", "sdxl": _SDXL_PROMAX}, needs_mask=True, union=7
    ),
    "softedge": ControlType(
        "pidinet",
        {"sd15": _SD15 + "v11p_sd15_softedge", "sd21": _SD21 + "hed-diffusers", "sdxl": _SDXL_UNION},
        choices=("hed",),
        union=2,
    ),
    "lineart": ControlType(
        "lineart_standard",
        {"sd15": _SD15 + "v11p_sd15_lineart", "sdxl": _SDXL_UNION},
        choices=("lineart_realistic", "lineart_coarse", "lineart_anime", "invert"),
        lines=True,
        union=3,
    ),
    "shuffle": ControlType("shuffle", {"sd15": _SD15 + "v11e_sd15_shuffle"}),
    "tile": ControlType(
        "tile", {"sd15": _SD15 + "v11f1e_sd15_tile", "sdxl": "xinsir/controlnet-tile-sdxl-1.0"}, union=6
    ),
    "face_detector": ControlType(
        "mediapipe_face",
        {
            "sd15": "CrucibleAI/ControlNetMediaPipeFace (subfolder diffusion_sd15)",
            "sd21": "CrucibleAI/ControlNetMediaPipeFace",
        },
        lines=True,
    ),
    "qrcode": ControlType("tile", {"sd15": "monster-labs/control_v1p_sd15_qrcode_monster"}, lines=True),
    "lineart_anime": ControlType(
        "lineart_anime",
        {"sd15": _SD15 + "v11p_sd15s2_lineart_anime", "sdxl": _SDXL_UNION},
        choices=("invert",),
        lines=True,
        union=3,
    ),
}


UNION = "union"
"""In place of a control type: a ControlNet-Union, which is told its types with each request."""


def union_control_types(count: int) -> tuple[str, ...]:
    """Control types that a ControlNet-Union of ``count`` types (its ``num_control_type``) knows."""
    return tuple(name for name, row in CONTROL_TYPES.items() if row.union is not None and row.union < count)


def control_type_problem(name: str) -> str | None:
    """Why ``name`` can't be used, as a message for the client, or None."""
    return None if name in CONTROL_TYPES else one_of("controlnet_type", name, tuple(CONTROL_TYPES))


def annotator_problem(control_type: str, annotator: str | None) -> str | None:
    """Why a request can't choose this annotator, as a message for the client, or None. None chooses the default.

    Whether its weights are there is another question: ``serve_app.annotators.readiness``.
    """
    allowed = CONTROL_TYPES[control_type].annotators
    return None if annotator is None or annotator in allowed else one_of("annotator", annotator, allowed)
