"""The network classes of controlnet-aux, without what importing that package does. The one place that imports it.

``import controlnet_aux`` runs the optional stacks of all its detectors: it fails when a new mediapipe is installed and
warns when none is. Importing a submodule runs the same file first. So the folder is imported a second time, under a
name of our own, as a package whose ``__init__`` is empty; packages in it that do things at import (``open_pose`` sets
an environment variable, ``zoe`` and ``leres`` read more than their networks) are given empty ``__init__`` files in the
same way. The real name is never touched: whoever imports ``controlnet_aux`` gets what they would get without us.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import threading
from types import ModuleType

from serve_app.errors import AnnotatorUnavailable

_ALIAS = "controlnet_aux_parts"
_BARE = ("leres", "mlsd", "normalbae", "open_pose", "pidi")
"""Packages whose own ``__init__`` is not run."""
_EFFICIENTNET = "normalbae/nets/submodules/efficientnet_repo/geffnet"

_LOCK = threading.RLock()


def part(name: str) -> ModuleType:
    """The module ``controlnet_aux.<name>``; safe from several threads.

    Raises:
        AnnotatorUnavailable: controlnet-aux is not installed.
    """
    with _LOCK:
        if _ALIAS not in sys.modules:
            _add_bare_packages()
        return importlib.import_module(f"{_ALIAS}.{name}")


def efficientnet() -> ModuleType:
    """The EfficientNets that come with NormalBae. They import themselves as ``geffnet``, so that name is lent to them.

    ``torch.hub``, which controlnet-aux loads them with, would add their folder to ``sys.path`` instead.
    """
    with _LOCK:
        name = f"{_ALIAS}.geffnet"
        if name not in sys.modules:
            if _ALIAS not in sys.modules:
                _add_bare_packages()
            folder = f"{sys.modules[_ALIAS].__path__[0]}/{_EFFICIENTNET}"
            sys.modules[name] = _import_as("geffnet", folder)
        return sys.modules[name]


def _import_as(name: str, folder: str) -> ModuleType:
    """Run the package in ``folder`` as ``name`` and take the name back."""
    others = {key: sys.modules.pop(key) for key in tuple(sys.modules) if key.partition(".")[0] == name}
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])
    if spec is None or spec.loader is None:
        raise AnnotatorUnavailable(f"The annotator is not available: controlnet-aux has no {_EFFICIENTNET}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for key in tuple(sys.modules):
            if key.partition(".")[0] == name:
                del sys.modules[key]
        sys.modules.update(others)
    return module


def _add_bare_packages() -> None:
    spec = importlib.util.find_spec("controlnet_aux")  # finds the folder, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise AnnotatorUnavailable("The annotator is not available: the package controlnet-aux is not installed.")
    (folder, *_) = spec.submodule_search_locations
    bare = {f"{_ALIAS}.{name}": f"{folder}/{name.replace('.', '/')}" for name in _BARE}
    for name, place in {_ALIAS: folder, **bare}.items():
        package = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.submodule_search_locations = [place]
        sys.modules[name] = importlib.util.module_from_spec(package)
