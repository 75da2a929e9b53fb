"""ANNOTATORS: one row per detector. Strings only, so that importing the table imports no detector."""

from collections.abc import Mapping

from serve_app.annotators.source import AnnotatorRow, Param, Switch

_SAFE = Switch("safe", False, "Three levels only, so that the photo cannot be read back from the edges")
_LOW = "Gradient above which an edge goes on"
_OPENPOSE_SIZE = 512
"""OpenPose works on pictures 184 pixels high whatever it is given: more only costs time. Points are drawn at the
output's size in any case."""


def _resolution(default: int = 0) -> Param:
    what = "Short side in pixels at which the detector looks, 1.5 megapixels at most; 0: the output's own size"
    return Param("resolution", default, 64, 1024, 64, what, or_zero=True, whole=True)


ANNOTATORS: Mapping[str, AnnotatorRow] = {
    "canny": AnnotatorRow(
        "serve_app.annotators.edges:canny",
        (
            Param("low_threshold", 100, 0, 255, 1, _LOW, whole=True, below="high_threshold"),
            Param("high_threshold", 200, 0, 255, 1, "Gradient above which an edge starts", whole=True),
        ),
    ),
    "xdog": AnnotatorRow(
        "serve_app.annotators.edges:xdog",
        (Param("threshold", 32, 1, 128, 1, "How much darker than its surroundings a stroke is"),),
    ),
    "lineart_standard": AnnotatorRow(
        "serve_app.annotators.edges:lineart_standard",
        (
            Param("sigma", 6.0, 0.5, 32, 0.5, "Radius of the surroundings in pixels"),
            Param("threshold", 8, 0, 64, 1, "Contrast below which a pixel is ground when the brightness is set"),
        ),
    ),
    "invert": AnnotatorRow("serve_app.annotators.pictures:invert", pixelwise=True),
    "shuffle": AnnotatorRow(
        "serve_app.annotators.pictures:shuffle",
        (Param("scale", 256, 16, 1024, 16, "Size of the folds in pixels", whole=True),),
    ),
    "tile": AnnotatorRow("serve_app.annotators.pictures:tile", pixelwise=True),
    "inpaint": AnnotatorRow("serve_app.annotators.pictures:inpaint"),
    "depth_anything_v2": AnnotatorRow(
        "serve_app.annotators.depth:depth_anything", (_resolution(),), ("depth_anything_v2",)
    ),
    "midas": AnnotatorRow("serve_app.annotators.depth:midas", (_resolution(),), ("midas",)),
    "zoe": AnnotatorRow("serve_app.annotators.depth:zoe", (_resolution(),), ("zoe",)),
    "leres": AnnotatorRow(
        "serve_app.annotators.depth:leres",
        (
            Param("remove_near", 0, 0, 100, 0.1, "Percent of the depth range, from the near end, that becomes white"),
            Param("remove_background", 0, 0, 100, 0.1, "Percent of the range, from the far end, that becomes black"),
            _resolution(),
        ),
        ("leres",),
    ),
    "normal_bae": AnnotatorRow("serve_app.annotators.depth:normal_bae", (_resolution(),), ("normal_bae",)),
    "hed": AnnotatorRow("serve_app.annotators.softedge:hed", (_SAFE, _resolution()), ("hed",)),
    "pidinet": AnnotatorRow("serve_app.annotators.softedge:pidinet", (_SAFE, _resolution()), ("pidinet",)),
    "scribble_hed": AnnotatorRow("serve_app.annotators.softedge:scribble_hed", (_SAFE, _resolution()), ("hed",)),
    "scribble_pidinet": AnnotatorRow(
        "serve_app.annotators.softedge:scribble_pidinet", (_SAFE, _resolution()), ("pidinet",)
    ),
    "lineart_realistic": AnnotatorRow("serve_app.annotators.lineart:realistic", (_resolution(),), ("lineart",)),
    "lineart_coarse": AnnotatorRow("serve_app.annotators.lineart:coarse", (_resolution(),), ("lineart_coarse",)),
    "lineart_anime": AnnotatorRow("serve_app.annotators.lineart:anime", (_resolution(),), ("lineart_anime",)),
    "mlsd": AnnotatorRow(
        "serve_app.annotators.lineart:mlsd",
        (
            Param("value_threshold", 0.1, 0.01, 1, 0.01, "Confidence above which a line is drawn"),
            Param(
                "distance_threshold", 0.1, 0.01, 20, 0.01, "Length above which a line is drawn, in units of 2 pixels"
            ),
            _resolution(),
        ),
        ("mlsd",),
    ),
    "openpose_body": AnnotatorRow("serve_app.annotators.pose:body", (_resolution(_OPENPOSE_SIZE),), ("openpose_body",)),
    "openpose_hand": AnnotatorRow(
        "serve_app.annotators.pose:hand", (_resolution(_OPENPOSE_SIZE),), ("openpose_body", "openpose_hand")
    ),
    "openpose_face": AnnotatorRow(
        "serve_app.annotators.pose:face", (_resolution(_OPENPOSE_SIZE),), ("openpose_body", "openpose_face")
    ),
    "openpose_full": AnnotatorRow(
        "serve_app.annotators.pose:full",
        (_resolution(_OPENPOSE_SIZE),),
        ("openpose_body", "openpose_hand", "openpose_face"),
    ),
    "upernet": AnnotatorRow("serve_app.annotators.segmentation:upernet", (_resolution(),), ("upernet",)),
    "mediapipe_face": AnnotatorRow(
        "serve_app.annotators.face:mediapipe_face",
        (
            Param("max_faces", 1, 1, 10, 1, "Faces drawn at most", whole=True),
            Param("min_confidence", 0.5, 0.01, 1, 0.01, "Confidence above which a face is a face"),
            _resolution(),
        ),
        ("face_landmarker",),
    ),
}
