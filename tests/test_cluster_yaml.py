"""cluster.yaml is what Ray's cluster launcher accepts."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

FILE = Path(__file__).parent.parent / "cluster.yaml"


def test_cluster_yaml_passes_rays_own_schema_and_checks() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILE.read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_workerz": 1}, schema)


def test_head_runs_no_replicas_and_authentication_is_on() -> None:
    config = yaml.safe_load(FILE.read_text())
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu_worker"]["resources"]["GPU"] == 1
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("RAY_AUTH_MODE=token" in line for line in config[command])
