"""WEIGHTS and NETWORKS: which files the detectors need, where they come from, and where they lie on this machine.

Strings and paths only: no torch here, so that a gateway can tell which annotators are ready.

Below the weights folder a file of the hub repository ``owner/name`` is looked for in two places: ``owner/name/file``,
which is what ``controlnet-serve weights convert`` writes and what a plain copy of a repository looks like, and
``models--owner--name/snapshots/<revision>/file``, the layout of the hub's own cache, which
``controlnet-serve weights fetch`` fills. The first of the two folders that has all files is read: what an operator put
into the plain one wins, and ``weights verify`` compares either with the published hash. Services read safetensors and,
for MediaPipe, a ``.task`` file of a known hash. Pickles are read by ``convert`` alone.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from serve_app.annotators.source import AnnotatorRow
from serve_app.errors import AnnotatorUnavailable, one_of

MEDIAPIPE_REMEDY = (
    "python -m pip install --no-deps mediapipe && python -m pip install absl-py certifi flatbuffers sounddevice "
    "matplotlib (with its dependencies, mediapipe would bring opencv-contrib-python, which overwrites "
    "opencv-python-headless)"
)
"""What mediapipe 1.2.2 asks for, less numpy and OpenCV, which are here."""

LARGEST_BYTES = 4 * 1024**3
"""No file of weights that is larger is downloaded or converted; the largest in WEIGHTS, zoe, has 1.3 GiB."""

_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")


@dataclass(frozen=True, slots=True)
class Weights:
    """One row of WEIGHTS: a file as it is published."""

    repo: str
    """``owner/name`` on the Hugging Face hub; for a ``url``, the folder it is kept in."""
    file: str
    licence: str
    revision: str | None = None
    """Commit of the repository; None: not pinned, ``main`` is fetched."""
    sha256: str | None = None
    """Of ``file`` as published; None: not known."""
    inner: tuple[str, ...] = ()
    """Keys that lead to the state dict inside a pickle."""
    prefix: str = ""
    """Removed from the start of every name in the state dict."""
    beside: tuple[str, ...] = ()
    """Files of the same repository that are needed with it."""
    pickle: str | None = None
    """What ``file`` can be converted from where the repository has no safetensors."""
    pickle_sha256: str | None = None
    """Of ``pickle`` as published; None: not known."""
    url: str | None = None
    """Where it is published if not on the hub."""

    @property
    def served(self) -> str:
        """The name of the file that services read."""
        return f"{Path(self.file).stem}.safetensors" if self.is_pickle else self.file

    @property
    def is_pickle(self) -> bool:
        return self.file.endswith((".pth", ".pt"))

    @property
    def converted_from(self) -> str | None:
        """The pickle that ``served`` can be made of, or None."""
        return self.file if self.is_pickle else self.pickle

    def known_sha256(self, file: str) -> str | None:
        """Of ``file`` as published; None: not known, or it is nothing that is published."""
        return {self.file: self.sha256, self.pickle: self.pickle_sha256}.get(file)

    @property
    def label(self) -> str:
        return f"{self.repo}: {self.file}"


@dataclass(frozen=True, slots=True)
class Network:
    """One row of NETWORKS: what is loaded, and from which weights."""

    loader: str
    """``module:function``; gets the path of the file that is served."""
    weights: str
    """Name in WEIGHTS."""
    package: str = ""
    """An optional package that must be installed."""
    remedy: str = ""
    """The command that installs it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The annotator can run: its weights are there and may be read. If they are intact, ``weights verify`` tells."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The annotator can't run."""

    reason: str
    """What is missing, its licence, and the command that gets it."""


Readiness = Ready | Missing

WeightState = Literal["ready", "unreadable", "to convert", "incomplete", "missing"]
"""``unreadable``: all is there, but this user may not read it; ``to convert``: a pickle is there; ``incomplete``: a
file that belongs beside the weights is not."""

_PLACE = "with the server's --data or -c"
"""Without one of them, a command looks into the folder of the defaults."""

# Hashes and commits are those that public code which fetches these files states. They were not compared with the hub
# itself; a wrong one refuses a good file and never lets in a bad one. Depth-Anything-V2-Small-hf: ten projects state
# the same SHA-256, some as the hub's own (LFS). dpt-hybrid-midas: many state the commit, one of them the SHA-256 of the
# pickle, in a list of LFS hashes whose other entries are well known. zoedepth-nyu and upernet-convnext-small: found
# nowhere.
_ANNOTATORS = "lllyasviel/Annotators"
_COMMIT = "982e7edaec38759d914a963c48c4726685de7d96"
_FACE_LANDMARKER = "mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task"
_OPENPOSE_LICENCE = "OpenPose licence, non-commercial research only"


def _pickle(file: str, licence: str, sha256: str, inner: tuple[str, ...] = (), prefix: str = "") -> Weights:
    return Weights(_ANNOTATORS, file, licence, _COMMIT, sha256, inner, prefix)


def _folder(
    repo: str, licence: str, revision: str | None = None, sha256: str | None = None, pickle_sha256: str | None = None
) -> Weights:
    """A model that transformers loads."""
    file, pickle, beside = "model.safetensors", "pytorch_model.bin", ("config.json",)
    return Weights(repo, file, licence, revision, sha256, beside=beside, pickle=pickle, pickle_sha256=pickle_sha256)


WEIGHTS: Mapping[str, Weights] = {
    "hed": _pickle(
        "ControlNetHED.pth", "Apache-2.0", "5ca93762ffd68a29fee1af9d495bf6aab80ae86f08905fb35472a083a4c7a8fa"
    ),
    "pidinet": _pickle(
        "table5_pidinet.pth",
        "PiDiNet licence, research only",
        "80860ac267258b5f27486e0ef152a211d0b08120f62aeb185a050acc30da486c",
        ("state_dict",),
        "module.",
    ),
    "mlsd": _pickle(
        "mlsd_large_512_fp32.pth", "Apache-2.0", "5696f168eb2c30d4374bbfd45436f7415bb4d88da29bea97eea0101520fba082"
    ),
    "lineart": _pickle("sk_model.pth", "MIT", "c686ced2a666b4850b4bb6ccf0748031c3eda9f822de73a34b8979970d90f0c6"),
    "lineart_coarse": _pickle(
        "sk_model2.pth", "MIT", "30a534781061f34e83bb9406b4335da4ff2616c95d22a585c1245aa8363e74e0"
    ),
    "lineart_anime": _pickle(
        "netG.pth", "MIT", "ccabdcc3f5cf3c07cf65d58776acb21df7dfda825cdc70c9766a93fd62bfc488", prefix="module."
    ),
    "normal_bae": _pickle(
        "scannet.pt",
        "MIT",
        "03dbf1600c51ee3d45c29f77b77bf1a3b7a24c3452dba62a4ae658f37330c209",
        ("model",),
        "module.",
    ),
    "leres": _pickle(
        "res101.pth",
        "BSD-2-Clause, academic use only",
        "1d696b2ef3e8336b057d0c15bc82d2fecef821bfebe5ef9d7671a5ec5dde520b",
        ("depth_model",),
        "module.",
    ),
    "openpose_body": _pickle(
        "body_pose_model.pth", _OPENPOSE_LICENCE, "25a948c16078b0f08e236bda51a385d855ef4c153598947c28c0d47ed94bb746"
    ),
    "openpose_hand": _pickle(
        "hand_pose_model.pth", _OPENPOSE_LICENCE, "b76b00d1750901abd07b9f9d8c98cc3385b8fe834a26d4b4f0aad439e75fc600"
    ),
    "openpose_face": _pickle(
        "facenet.pth", _OPENPOSE_LICENCE, "8beb52e548624ffcc4aed12af7aee7dcbfaeea420c75609fee999fe7add79d43"
    ),
    "depth_anything_v2": _folder(
        "depth-anything/Depth-Anything-V2-Small-hf",
        "Apache-2.0",
        "5426e4f0f36572d16453bbda7a8389317b1bef99",
        "3152477ce0d8d6978d76b995120de97cb5b928701fd0f817769f59e249a16b70",
    ),
    "midas": _folder(
        "Intel/dpt-hybrid-midas",
        "Apache-2.0",
        "11eaf7a1cf4bd70740697dbc216f98980c0aeb03",
        pickle_sha256="b6c4d44f9d96ca3fa76dd3bbb153989a60b4ad5526559f3c598562a368d687ec",
    ),
    "zoe": _folder("Intel/zoedepth-nyu", "MIT"),
    "upernet": _folder("openmmlab/upernet-convnext-small", "MIT"),
    "face_landmarker": Weights(
        "mediapipe/face_landmarker",
        "face_landmarker.task",
        "Apache-2.0",
        sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
        url=f"https://storage.googleapis.com/{_FACE_LANDMARKER}",
    ),
}

_LOADERS = "serve_app.annotators.networks"

NETWORKS: Mapping[str, Network] = {
    "hed": Network(f"{_LOADERS}:hed", "hed"),
    "pidinet": Network(f"{_LOADERS}:pidinet", "pidinet"),
    "mlsd": Network(f"{_LOADERS}:mlsd", "mlsd"),
    "lineart": Network(f"{_LOADERS}:lineart", "lineart"),
    "lineart_coarse": Network(f"{_LOADERS}:lineart", "lineart_coarse"),
    "lineart_anime": Network(f"{_LOADERS}:lineart_anime", "lineart_anime"),
    "normal_bae": Network(f"{_LOADERS}:normal_bae", "normal_bae"),
    "leres": Network(f"{_LOADERS}:leres", "leres"),
    "openpose_body": Network(f"{_LOADERS}:openpose_body", "openpose_body"),
    "openpose_hand": Network(f"{_LOADERS}:openpose_hand", "openpose_hand"),
    "openpose_face": Network(f"{_LOADERS}:openpose_face", "openpose_face"),
    "depth_anything_v2": Network(f"{_LOADERS}:depth_anything", "depth_anything_v2"),
    "midas": Network(f"{_LOADERS}:midas", "midas"),
    "zoe": Network(f"{_LOADERS}:zoe", "zoe"),
    "upernet": Network(f"{_LOADERS}:upernet", "upernet"),
    "face_landmarker": Network("serve_app.annotators.face:load", "face_landmarker", "mediapipe", MEDIAPIPE_REMEDY),
}


@dataclass(frozen=True, slots=True)
class WeightStore:
    """The weights folder of this machine."""

    folder: Path
    table: Mapping[str, Weights] = field(default_factory=lambda: WEIGHTS)

    def row(self, name: str) -> Weights:
        """Raises AnnotatorUnavailable: there are no weights of this name."""
        if name not in self.table:
            raise AnnotatorUnavailable(one_of("weights", name, tuple(self.table)))
        return self.table[name]

    def folders(self, name: str) -> tuple[Path, ...]:
        """Where the files of ``name`` are looked for, in this order; the folders need not be there."""
        row = self.row(name)
        plain = self.folder / row.repo
        cached = self.folder / f"models--{row.repo.replace('/', '--')}"
        revision = row.revision or _main(cached)
        if revision is None or not _REVISION.fullmatch(revision):
            return (plain,)
        return plain, cached / "snapshots" / revision

    def find(self, name: str, file: str) -> Path | None:
        """Where ``file`` of the repository of ``name`` lies, or None. A half-written file has another name."""
        return next((folder / file for folder in self.folders(name) if _is_file(folder / file)), None)

    def complete(self, name: str, file: str) -> Path | None:
        """``file`` in the first folder that also has what belongs beside it."""
        files = (file, *self.row(name).beside)
        for folder in self.folders(name):
            if all(_is_file(folder / each) for each in files):
                return folder / file
        return None

    def served(self, name: str) -> Path | None:
        """The file that a service reads, if it and the files beside it are there."""
        return self.complete(name, self.row(name).served)

    def files(self, name: str) -> tuple[Path, ...]:
        """What a service reads: ``served`` and the files beside it; empty where they are not there."""
        path = self.served(name)
        return () if path is None else (path, *(path.parent / other for other in self.row(name).beside))

    def state(self, name: str) -> WeightState:
        """What lies in the folder, by names and permissions alone."""
        row = self.row(name)
        if there := self.files(name):
            return "ready" if all(map(_may_read, there)) else "unreadable"
        files = [row.served, *([row.converted_from] if row.converted_from else [])]
        if self.complete(name, files[-1]) is not None:
            return "to convert"
        return "incomplete" if any(self.find(name, file) is not None for file in files) else "missing"

    def problem(self, network: str) -> str | None:
        """All that keeps a network from being loaded, for the person who can mend it, or None."""
        weights = NETWORKS[network].weights
        state = self.state(weights)
        lacking = self._lacking(weights, state) if state != "ready" else None
        return "; ".join(filter(None, (package_problem(network), lacking))) or None

    def _lacking(self, name: str, state: WeightState) -> str:
        row = self.row(name)
        origin = f"{row.url or f'the repository {row.repo}'} (licence: {row.licence})"
        if state == "unreadable":
            file = next((path.name for path in self.files(name) if not _may_read(path)), row.served)
            return (
                f"the file {file} of the weights {name} cannot be read by this user; give the server's user the right"
            )
        fetch, convert = (f"controlnet-serve weights {verb} {name}" for verb in ("fetch", "convert"))
        lies = self.find(name, row.served) or (row.converted_from and self.find(name, row.converted_from))
        if state == "to convert":
            what = f"the weights {row.converted_from} from {origin} are not converted yet"
            return f"{what}; run: {convert}, {_PLACE}"
        what = f"the weights {row.file} from {origin} are not in the weights folder"
        if state == "incomplete" and lies:
            lacking = ", ".join(file for file in row.beside if not _is_file(lies.parent / file))
            what = f"the weights {lies.name} from {origin} are there without their {lacking}"
        then = f", then {convert}" if row.is_pickle else ""
        return f"{what}; run: {fetch}{then}, {_PLACE}"

    def require(self, network: str) -> Path:
        """The file to load a network from.

        Raises:
            AnnotatorUnavailable: it or a package is missing, or it may not be read; the message says what helps.
        """
        problem = self.problem(network)
        path = self.served(NETWORKS[network].weights)
        if problem is not None or path is None:
            raise AnnotatorUnavailable(f"The annotator is not available: {problem}.")
        return path

    def readiness(self, annotators: Mapping[str, AnnotatorRow]) -> dict[str, Readiness]:
        """Which annotators can run here, by what lies in the folder and may be read. Opens no file."""
        found: dict[str, Readiness] = {}
        for name, row in annotators.items():
            problems = [problem for network in row.networks if (problem := self.problem(network)) is not None]
            found[name] = Missing("; ".join(problems)) if problems else Ready()
        return found


def package_problem(network: str) -> str | None:
    """Says that an optional package is not installed, and what installs it; None: nothing lacks."""
    row = NETWORKS[network]
    if not row.package or importlib.util.find_spec(row.package) is not None:
        return None
    return f"the package {row.package} is not installed; run: {row.remedy}"


def _is_file(path: Path) -> bool:
    """Whether it is a file; what may not be looked at is none."""
    try:
        return path.is_file()
    except OSError:  # pathlib tells apart what is not there and what is not permitted
        return False


def _may_read(path: Path) -> bool:
    """Whether the user that this process acts as may read it."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def _main(cached: Path) -> str | None:
    """The commit that the hub's cache knows as ``main``."""
    try:
        return (cached / "refs" / "main").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
