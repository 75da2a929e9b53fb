"""The configuration tree: what it refuses, and what it derives."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.config import AppConfig, DenoiserConfig, launch_settings, load_config, secret
from serve_app.errors import ConfigError, UnknownModel

CONFIGS = sorted((Path(__file__).parent.parent / "deployments" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path).denoisers


def test_unknown_keys_are_refused_by_their_path(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server: {public_ulr: x}\nnodez: 2\n")
    with pytest.raises(ConfigError, match=r"server\.public_ulr.*nodez"):
        load_config(file)


@pytest.mark.parametrize("text", ["- a list", "a: [", "data: {}"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"nodes": "many"}, "PostgreSQL"),
        ({"nodes": "many", "database": {"url": "postgresql+psycopg://h/d"}}, "storage.shared"),
        ({"denoisers": []}, "at least one"),
        ({"denoisers": [{"name": "A"}, {"name": "A", "families": ["x"]}]}, "names must differ"),
        ({"denoisers": [{"name": "A"}, {"name": "B"}]}, "only one may leave families empty"),
        ({"annotator": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}}, "above max_replicas"),
        (
            {"annotator": {"autoscaling_config": {"target_ongoing_requests": 32}}},
            "32 must be below 32, the calls",
        ),
        (
            {"denoisers": [{"max_running": 4, "autoscaling_config": {"target_ongoing_requests": 9}}]},
            "9 must be below 8, the calls that one replica takes at once",
        ),
        ({"models": [{"id": "../x", "path": "p"}]}, "pattern"),
    ],
)
def test_inconsistent_trees_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppConfig.model_validate(tree)


def test_family_chooses_the_denoiser() -> None:
    config = AppConfig(denoisers=(DenoiserConfig(name="Rest"), DenoiserConfig(name="XL", families=("sdxl",))))
    assert config.denoiser_for("sdxl").name == "XL"
    assert config.denoiser_for("sd15").name == "Rest"
    only = AppConfig(denoisers=(DenoiserConfig(name="XL", families=("sdxl",)),))
    with pytest.raises(UnknownModel, match="sdxl"):
        only.denoiser_for("sd15")


def test_secrets_are_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "value")
    assert secret("SOME_SECRET") == "value"
    assert secret(None) is None
    monkeypatch.delenv("SOME_SECRET")
    with pytest.raises(ConfigError, match="SOME_SECRET"):
        secret("SOME_SECRET")


def test_launch_settings_from_the_environment(tmp_path: Path) -> None:
    settings = launch_settings({"PORT": "9000", "DATA": str(tmp_path), "KEY": "k" * 16})
    assert (settings.port, settings.key) == (9000, "k" * 16)
    assert settings.config.data_folder == tmp_path
    assert settings.config.public_url == "http://127.0.0.1:9000"


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_a_wrong_port_is_named(port: str) -> None:
    with pytest.raises(ConfigError, match=f"PORT.*{port}"):
        launch_settings({"PORT": port})


def test_a_database_url_holds_no_password() -> None:
    with pytest.raises(ValidationError, match="password_env"):
        AppConfig.model_validate({"database": {"url": "postgresql+psycopg://user:secret@host/db"}})
