"""Optional stacks: with a new mediapipe, with a broken one, with none, everything else is imported and works."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from serve_app.annotators import ANNOTATORS
from serve_app.annotators.isolation import efficientnet, part

MEDIAPIPE = {
    "none": None,
    "new": "__version__ = '1.2.2'\n",  # no `solutions`: importing controlnet_aux with it fails
    "broken": "raise RuntimeError('built for another numpy')\n",
}

PROGRAM = """
import os, sys
before = dict(os.environ)
import numpy as np
from pathlib import Path
from types import ModuleType
from serve_app.annotators import ANNOTATORS, Missing, annotate, readiness
from serve_app.annotators.weights import WeightStore
from serve_app.annotators import isolation
from serve_app.tasks import AnnotationTask
parts = ("hed", "pidi.model", "mlsd.models.mbv2_mlsd_large", "open_pose.util", "open_pose.body", "util")
if "--parts" in sys.argv:
    for name in parts:
        isolation.part(name)
    isolation.efficientnet()
state = readiness(WeightStore(Path("/nowhere")))
print(*sorted(name for name, found in state.items() if isinstance(found, Missing)))
print(state["mediapipe_face"])
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
print(annotate(AnnotationTask(control_type="canny", width=64, height=64), image, None)[0].any())
print(*sorted(name for name in sys.modules if name.partition(".")[0] in {"controlnet_aux", "geffnet", "mediapipe"}))
print({key for key, value in os.environ.items() if before.get(key) != value} & {"KMP_DUPLICATE_LIB_OK"} or "-")
print(sys.argv)
"""


@pytest.mark.parametrize("mediapipe", MEDIAPIPE)
def test_a_process_lists_what_is_missing_and_serves_the_rest(mediapipe: str, tmp_path: Path) -> None:
    source = MEDIAPIPE[mediapipe]
    if source is not None:
        (tmp_path / "mediapipe").mkdir()
        (tmp_path / "mediapipe" / "__init__.py").write_text(source)
    arguments = ["--parts", "--unknown"] if mediapipe == "new" else ["--unknown"]
    environment = {key: value for key, value in os.environ.items() if key != "KMP_DUPLICATE_LIB_OK"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missing, face, works, loaded, changed, argv = done.stdout.splitlines()
    assert missing.split() == sorted(name for name, row in ANNOTATORS.items() if row.networks)
    assert ("pip install --no-deps mediapipe" in face) == (mediapipe == "none")
    assert works == "True"
    assert loaded == "", "names that belong to others were taken"
    assert changed == "-"
    assert argv == str(["-c", *arguments])


def test_many_threads_get_the_same_modules() -> None:
    names = ["hed", "pidi.model", "lineart", "util", "open_pose.util"] * 4
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(part, names))
        networks = list(pool.map(lambda _: efficientnet(), range(4)))
    assert all(module is part(name) for module, name in zip(modules, names, strict=True))
    assert len(set(map(id, networks))) == 1


def test_who_has_another_geffnet_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ModuleType("geffnet")
    monkeypatch.setitem(sys.modules, "geffnet", others)
    monkeypatch.delitem(sys.modules, "controlnet_aux_parts.geffnet", raising=False)
    assert efficientnet() is not others
    assert sys.modules["geffnet"] is others
