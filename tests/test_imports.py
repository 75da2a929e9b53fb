"""What importing costs: a gateway starts without torch, and the product without Ray."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh interpreter that ran ``statement``."""
    code = f"{statement}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(output.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serve_app", {"ray", "torch", "deployments", "fastapi", "sqlalchemy"}),
        ("serve_app.api.application", {"ray", "torch", "diffusers", "transformers", "controlnet_aux", "cv2"}),
        ("serve_app.jobs.dispatcher", {"ray", "torch", "diffusers", "transformers", "controlnet_aux", "cv2"}),
        ("serve_app.cli", {"ray", "torch", "diffusers", "transformers"}),
        ("serve_app.engine.batching", {"ray", "torch", "diffusers"}),
        ("deployments.application", {"torch", "diffusers", "transformers", "cv2"}),
    ],
)
def test_import_leaves_heavy_packages_alone(module: str, absent: set[str]) -> None:
    assert modules_after(f"import {module}") & absent == set()
