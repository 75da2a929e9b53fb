"""What ``make serve`` makes of a configuration, without starting anything."""

import pytest

from deployments.serve import for_this_machine
from serve_app.config import AppConfig


@pytest.mark.parametrize(
    ("denoisers", "gpus", "given"),
    [
        ([{}], 0, [0]),
        ([{}], 1, [1]),
        ([{"replicas": 2}], 1, [0]),
        ([{"replicas": 2}], 2, [1]),
        ([{"device": "cpu"}], 1, [0]),
        ([{"num_gpus": 0.5}], 1, [0.5]),
        ([{"name": "A", "families": ["sd15"]}, {"name": "B"}], 2, [1, 1]),
        ([{"name": "A", "families": ["sd15"], "num_gpus": 1}, {"name": "B"}], 2, [1, 0]),
        ([{"autoscaling_config": {"max_replicas": 4}}], 1, [0]),
    ],
)
def test_gpus_go_to_denoisers_of_which_nothing_is_said(
    denoisers: list[dict[str, object]], gpus: int, given: list[float]
) -> None:
    config = for_this_machine(AppConfig.model_validate({"denoisers": denoisers}), gpus)
    assert [own.num_gpus for own in config.denoisers] == given
    assert config.annotator.num_gpus == 0
