import subprocess
import sys

import pytest
import sqlalchemy as sa

from serve_app.database import Database
from serve_app.errors import ConfigError, UnknownModel
from serve_app.models.catalog import Catalog, ModelEntry, ModelType


def entry(name: str, kind: ModelType = ModelType.BASE, **changes: str | int | None) -> ModelEntry:
    values = {"family": "sd15", "location": f"/models/{name}", "hash": "aa", "size_bytes": 7}
    return ModelEntry.model_validate({"id": name, "type": kind, **values, **changes})


def test_what_is_added_is_found(catalog: Catalog) -> None:
    added = catalog.add(entry("dream"))
    assert catalog.find("dream") == catalog.get("dream") == added
    assert added.created_at > 1.7e9
    assert catalog.find("other") is None


def test_adding_again_changes_nothing(catalog: Catalog) -> None:
    first = catalog.add(entry("dream"))
    assert catalog.add(entry("dream")) == first
    assert catalog.list() == (first,)


def test_new_files_replace_the_old_and_keep_the_time(catalog: Catalog) -> None:
    first = catalog.add(entry("dream"))
    second = catalog.add(entry("dream", hash="bb", location="/elsewhere", size_bytes=8))
    assert (second.hash, second.location, second.size_bytes) == ("bb", "/elsewhere", 8)
    assert second.created_at == first.created_at
    assert catalog.get("dream") == second


def test_an_id_does_not_change_its_type(catalog: Catalog) -> None:
    before = catalog.add(entry("dream"))
    with pytest.raises(ConfigError, match="'dream' is taken by a model of type base"):
        catalog.add(entry("dream", ModelType.CONTROLNET))
    assert catalog.get("dream") == before


def test_unknown_ids_are_answered_with_those_of_the_kind(catalog: Catalog) -> None:
    catalog.add(entry("dream"))
    catalog.add(entry("edges", ModelType.CONTROLNET))
    with pytest.raises(UnknownModel, match=r"base model 'nope' is unknown\. Allowed: dream\.$"):
        catalog.get("nope", ModelType.BASE)
    with pytest.raises(UnknownModel, match=r"controlnet model 'dream' is unknown\. Allowed: edges\.$"):
        catalog.get("dream", ModelType.CONTROLNET)
    with pytest.raises(UnknownModel, match=r"Allowed: dream, edges\.$"):
        catalog.get("nope")


def test_an_empty_catalogue_says_so(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel, match="none is published"):
        catalog.get("nope", ModelType.BASE)


def test_base_models_come_first(catalog: Catalog) -> None:
    for name, kind in (("z", ModelType.LORA), ("n", ModelType.CONTROLNET), ("b", ModelType.BASE)):
        catalog.add(entry(name, kind))
    assert [model.id for model in catalog.list()] == ["b", "n", "z"]


def test_a_control_type_means_the_oldest_net_of_the_family(catalog: Catalog) -> None:
    catalog.add(entry("xl", ModelType.CONTROLNET, family="sdxl", control_type="canny"))
    first = catalog.add(entry("zz-first", ModelType.CONTROLNET, control_type="canny"))
    second = catalog.add(entry("aa-second", ModelType.CONTROLNET, control_type="canny"))
    assert catalog.net_for("canny", "sd15") == first
    assert catalog.net_for("tile", "sd15") is None
    assert catalog.nets("sd15") == (first, second)
    catalog.add(entry("zz-first", ModelType.CONTROLNET, control_type="canny", hash="bb"))
    assert catalog.nets("sd15")[0].id == "zz-first"


def test_models_published_within_one_tick_of_the_clock_keep_their_order(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "now_sql", lambda _: sa.literal(1_795_391_954.75))
    names = ["c", "a", "b"]
    for name in names:
        catalog.add(entry(name, ModelType.CONTROLNET))
    assert [net.id for net in catalog.nets("sd15")] == names


def test_a_deleted_model_is_gone(catalog: Catalog) -> None:
    catalog.add(entry("dream"))
    assert catalog.delete("dream")
    assert not catalog.delete("dream")
    assert catalog.list() == ()


def test_reading_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys, serve_app.models.catalog, serve_app.models.publish; "
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
