"""The key of a control map: everything that changes the map, and nothing else."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.annotators.cache import map_key
from serve_app.tasks import AnnotationTask

SCALARS = st.integers(0, 99) | st.booleans() | st.text(max_size=3)


@settings(deadline=None)
@given(
    params=st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3),
    other=st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3),
    pixel=st.integers(0, 255),
)
def test_a_key_is_the_same_for_the_same_and_different_for_anything_else(
    params: dict[str, Any], other: dict[str, Any], pixel: int
) -> None:
    task = AnnotationTask(control_type="depth", width=64, height=72, seed=3)
    image = np.zeros((4, 6, 3), np.uint8)
    mask = np.zeros((4, 6), np.uint8)
    key = map_key(task, "zoe", params, "v1", image, mask)
    assert key == map_key(task, "zoe", dict(reversed(params.items())), "v1", np.asfortranarray(image), mask.copy())
    touched = image.copy()
    touched[3, 5, 2] = pixel
    touched_mask = mask.copy()
    touched_mask[0, 0] = pixel
    different = [
        map_key(task.model_copy(update={"width": 72, "height": 64}), "zoe", params, "v1", image, mask),
        map_key(task.model_copy(update={"seed": 4}), "zoe", params, "v1", image, mask),
        map_key(task.model_copy(update={"control_type": "normal"}), "zoe", params, "v1", image, mask),
        map_key(task, "midas", params, "v1", image, mask),
        map_key(task, "zoe", params, "v2", image, mask),
        map_key(task, "zoe", params, "v1", image, None),
        map_key(task, "zoe", params, "v1", image.reshape(6, 4, 3), mask),
    ]
    if pixel:
        different += [
            map_key(task, "zoe", params, "v1", touched, mask),
            map_key(task, "zoe", params, "v1", image, touched_mask),
        ]
    if repr(sorted(params.items())) != repr(sorted(other.items())):
        different.append(map_key(task, "zoe", other, "v1", image, mask))
    assert len({key, *different}) == len(different) + 1
