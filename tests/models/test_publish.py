import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve_app.config import AppConfig, ModelSource
from serve_app.errors import ConfigError, FamilyMismatch, RetryableError, UnsafeModel
from serve_app.models.catalog import Catalog, ModelType
from serve_app.models.demo import DEMO_CONTROL_TYPES, install_demo
from serve_app.models.publish import publish, publish_all
from serve_app.models.sources import resolve


def test_a_published_model_is_listed_as_it_is(catalog: Catalog, base: Path) -> None:
    entry = publish(catalog, ModelSource(id="dream", path=base))
    found = resolve(base)
    assert (entry.type, entry.family) == (ModelType.BASE, "custom16")
    assert (entry.location, entry.hash, entry.size_bytes) == (str(base), found.hash(), found.size_bytes)
    assert catalog.list() == (entry,)


def test_publishing_twice_changes_nothing(catalog: Catalog, net: Path) -> None:
    source = ModelSource(id="edges", path=net, family="own", control_type="canny")
    first = publish(catalog, source)
    assert publish(catalog, source) == first
    assert catalog.net_for("canny", "own") == first


def test_other_files_replace_the_model(catalog: Catalog, net: Path) -> None:
    source = ModelSource(id="edges", path=net)
    first = publish(catalog, source)
    config = net / "config.json"
    config.write_text(config.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    second = publish(catalog, source)
    assert second.hash != first.hash
    assert catalog.list() == (second,)


def test_what_is_refused_is_not_listed(catalog: Catalog, base: Path) -> None:
    (base / "pipeline.py").touch()
    with pytest.raises(UnsafeModel, match="pipeline"):
        publish(catalog, ModelSource(id="dream", path=base))
    assert catalog.list() == ()


def test_a_family_that_the_weights_deny_is_refused(catalog: Catalog, base: Path) -> None:
    with pytest.raises(FamilyMismatch, match="'sd15', but its cross_attention_dim is 16"):
        publish(catalog, ModelSource(id="dream", path=base, family="sd15"))
    assert catalog.list() == ()


def test_names_that_would_mislead_are_refused(catalog: Catalog, base: Path, net: Path) -> None:
    with pytest.raises(ConfigError, match="'canny' is the name of a control type"):
        publish(catalog, ModelSource(id="canny", path=net))
    with pytest.raises(ConfigError, match=r"'cany' is unknown\. Allowed: canny, depth"):
        publish(catalog, ModelSource(id="edges", path=net, control_type="cany"))
    with pytest.raises(ConfigError, match="only a ControlNet has a control_type"):
        publish(catalog, ModelSource(id="dream", path=base, control_type="canny"))
    assert catalog.list() == ()


def test_a_configuration_is_published_whole(catalog: Catalog, base: Path, tmp_path: Path) -> None:
    config = AppConfig(data=tmp_path / "data", models=(ModelSource(id="dream", path=base),))
    entries = publish_all(config, catalog)
    assert [entry.id for entry in entries] == ["demo", *(f"demo-{name}" for name in DEMO_CONTROL_TYPES), "dream"]
    assert {entry.family for entry in entries[:-1]} == {"demo"}
    for control_type in DEMO_CONTROL_TYPES:
        net = catalog.net_for(control_type, "demo")
        assert net is not None
        assert net.id == f"demo-{control_type}"
    assert publish_all(config, catalog) == entries


def test_what_did_not_change_is_not_hashed_again(catalog: Catalog, base: Path, tmp_path: Path) -> None:
    """A wrong hash in the catalogue stays until somebody reads the files."""
    source = ModelSource(id="dream", path=base)
    config = AppConfig(data=tmp_path / "data", demo_model=False, models=(source,))
    time.sleep(0.05)  # the catalogue counts milliseconds, the disk ticks
    (right,) = publish_all(config, catalog)
    wrong = catalog.add(right.model_copy(update={"hash": "0" * 64}))
    assert publish_all(config, catalog) == (wrong,)
    assert publish(catalog, source) == right

    catalog.add(wrong)
    file = base / "unet" / "config.json"
    time.sleep(0.05)
    os.utime(file, (1, 1))  # as old as can be, but touched just now
    assert publish_all(config, catalog) == (right,)

    for change in ({"family": "other"}, {"size_bytes": 1}, {"location": "/elsewhere"}):
        catalog.delete("dream")
        catalog.add(wrong.model_copy(update=change))
        (entry,) = publish_all(config, catalog)
        assert entry.model_copy(update={"created_at": right.created_at}) == right


def test_a_disk_that_takes_no_demo_is_told(catalog: Catalog, tmp_path: Path) -> None:
    config = AppConfig(data=tmp_path / "data")
    config.published_models.mkdir(parents=True)
    (config.published_models / "demo").write_text("in the way")
    with pytest.raises(RetryableError, match="the demo model could not be written to"):
        publish_all(config, catalog)


def test_the_demo_model_can_be_left_out(catalog: Catalog, tmp_path: Path) -> None:
    assert publish_all(AppConfig(data=tmp_path / "data", demo_model=False), catalog) == ()
    assert catalog.list() == ()


def test_several_may_publish_at_once(catalog: Catalog, base: Path, tmp_path: Path) -> None:
    config = AppConfig(data=tmp_path / "data", models=(ModelSource(id="dream", path=base),))
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: publish_all(config, catalog), range(4)))
    assert outcomes == [outcomes[0]] * 4
    assert sorted(outcomes[0], key=lambda entry: entry.id) == sorted(catalog.list(), key=lambda entry: entry.id)


PUBLISH = """
import sys
from pathlib import Path
from serve_app.config import AppConfig
from serve_app.database import Database
from serve_app.models.catalog import Catalog
from serve_app.models.publish import publish_all

config = AppConfig(data=Path(sys.argv[1]))
database = Database(config.database_url)
database.migrate()
print([(entry.id, entry.hash) for entry in publish_all(config, Catalog(database))])
"""
TORCH = "print('torch' in sys.modules or 'diffusers' in sys.modules or 'transformers' in sys.modules)"


def test_a_complete_demo_is_published_without_torch(tmp_path: Path) -> None:
    install_demo(tmp_path / "models" / "demo")
    process = subprocess.run(
        [sys.executable, "-c", PUBLISH + TORCH, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True
    )
    entries, torch_was_needed = process.stdout.splitlines()
    assert entries.startswith("[('demo', ")
    assert torch_was_needed == "False"


@pytest.mark.full
def test_several_processes_may_publish_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert printed[0].startswith("[('demo', ")
    assert printed == [printed[0]] * 3
