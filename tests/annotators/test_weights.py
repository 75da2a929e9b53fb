"""Weights: where they are looked for, what is said when they are missing, and how they become what services read."""

import importlib.util
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from serve_app.annotators import ANNOTATORS, Missing, Ready, networks, readiness
from serve_app.annotators.convert import convert, verify
from serve_app.annotators.isolation import part
from serve_app.annotators.weights import NETWORKS, WEIGHTS, WeightStore
from serve_app.errors import AnnotatorUnavailable, ModelLoadFailed, UnsafeModel
from support.detectors import PICKLES, make_store, published_state, sha256, write_pickle, write_transformer


class TestTable:
    def test_networks_and_weights_fit_together(self) -> None:
        assert {network for row in ANNOTATORS.values() for network in row.networks} == set(NETWORKS)
        assert {row.weights for row in NETWORKS.values()} == set(WEIGHTS)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_a_row_says_where_from_and_under_which_licence(self, name: str) -> None:
        row = WEIGHTS[name]
        assert row.licence
        assert row.repo.count("/") == 1
        for known in filter(None, (row.sha256, row.pickle_sha256)):
            assert len(bytes.fromhex(known)) == 32
        assert row.revision is None or len(bytes.fromhex(row.revision)) == 20
        assert not row.is_pickle or row.sha256, "a pickle is read only if its hash is known"
        assert row.served.endswith((".safetensors", ".task"))


class TestReadiness:
    def test_without_weights_the_rest_is_ready_and_the_others_say_what_helps(self, tmp_path: Path) -> None:
        found = readiness(WeightStore(tmp_path))
        assert set(found) == set(ANNOTATORS)
        for name, state in found.items():
            assert isinstance(state, Missing) == bool(ANNOTATORS[name].networks)
        hed = found["hed"]
        assert isinstance(hed, Missing)
        for words in ("ControlNetHED", "lllyasviel/Annotators", "Apache-2.0", "controlnet-serve weights fetch hed"):
            assert words in hed.reason

    def test_what_is_published_is_named_with_the_whole_way(self, tmp_path: Path) -> None:
        found = readiness(WeightStore(tmp_path))
        leres, midas = found["leres"], found["midas"]
        assert isinstance(leres, Missing)
        assert "the weights res101.pth from the repository lllyasviel/Annotators" in leres.reason
        assert leres.reason.endswith(
            "run: controlnet-serve weights fetch leres, then controlnet-serve weights convert leres, "
            "with the server's --data or -c"
        )
        assert isinstance(midas, Missing)
        assert midas.reason.endswith("run: controlnet-serve weights fetch midas, with the server's --data or -c")

    def test_the_service_says_the_same(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotatorUnavailable, match="controlnet-serve weights fetch mlsd"):
            WeightStore(tmp_path).require("mlsd")

    def test_a_pickle_that_was_fetched_wants_converting(self, tmp_path: Path) -> None:
        write_pickle(tmp_path, "pidinet")
        state = readiness(WeightStore(tmp_path))["pidinet"]
        assert isinstance(state, Missing)
        assert "table5_pidinet.pth" in state.reason
        assert "run: controlnet-serve weights convert pidinet, with" in state.reason

    def test_the_hubs_own_layout_is_read(self, tmp_path: Path) -> None:
        write_transformer(tmp_path, "upernet")
        store = WeightStore(tmp_path)
        assert readiness(store)["upernet"] == Ready()
        assert "snapshots" in str(store.served("upernet"))

    def test_a_revision_that_is_a_path_is_none(self, tmp_path: Path) -> None:
        write_transformer(tmp_path, "upernet")
        (tmp_path / "models--openmmlab--upernet-convnext-small" / "refs" / "main").write_text("../../x")
        assert WeightStore(tmp_path).served("upernet") is None

    def test_a_model_without_its_configuration_is_not_there(self, tmp_path: Path) -> None:
        write_transformer(tmp_path, "upernet")
        (path,) = tmp_path.rglob("config.json")
        path.unlink()
        assert WeightStore(tmp_path).served("upernet") is None

    @pytest.mark.parametrize("name", ["midas", "zoe", "upernet", "depth_anything_v2"])
    def test_what_lacks_beside_the_weights_is_named(self, tmp_path: Path, name: str) -> None:
        write_transformer(tmp_path, name)
        (path,) = tmp_path.rglob("config.json")
        path.unlink()
        said = rf"model.safetensors from .* without their config.json; .*weights fetch {name}"
        for ask in (lambda store: store.require(name), lambda store: verify(store, name)):
            with pytest.raises(AnnotatorUnavailable, match=said) as caught:
                ask(WeightStore(tmp_path))
            assert str(tmp_path) not in caught.value.message

    def test_an_incomplete_folder_hides_no_complete_one(self, tmp_path: Path) -> None:
        write_transformer(tmp_path, "upernet")
        plain = tmp_path / "openmmlab" / "upernet-convnext-small"
        plain.mkdir(parents=True)
        (plain / "model.safetensors").touch()
        assert "snapshots" in str(WeightStore(tmp_path).served("upernet"))
        (plain / "config.json").touch()
        assert WeightStore(tmp_path).served("upernet") == plain / "model.safetensors"

    def test_package_and_weights_are_named_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        state = readiness(WeightStore(tmp_path))["mediapipe_face"]
        assert isinstance(state, Missing)
        for words in ("pip install --no-deps mediapipe", "face_landmarker.task", "weights fetch face_landmarker"):
            assert words in state.reason

    def test_an_unknown_name_is_answered_with_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotatorUnavailable, match="pidinet"):
            WeightStore(tmp_path).row("pidi")


class TestConvert:
    def test_every_tensor_arrives_under_its_own_name(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, "pidinet")
        path = store.served("pidinet")
        assert path is not None
        published = published_state("pidinet")
        with safe_open(path, framework="pt") as file:
            assert {f"module.{name}" for name in file.keys()} == set(published)  # noqa: SIM118  - not a mapping
            assert all(
                torch.equal(file.get_tensor(name.removeprefix("module.")), published[name]) for name in published
            )
            assert file.metadata()["source_sha256"] == store.row("pidinet").sha256

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_who_may_read_it_is_for_the_umask_to_say(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            path = make_store(tmp_path, "pidinet").require("pidinet")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def test_leres_is_converted_from_the_names_that_its_library_loads(self, tmp_path: Path) -> None:
        """``LeresDetector.from_pretrained`` of controlnet-aux 0.0.10: RelDepthModel, strictly, less ``module.``."""
        with torch.device("meta"):
            library = part("leres.leres.multi_depth_model_woauxi").RelDepthModel("resnext101").state_dict()
            ours = networks.leres_module().state_dict()
        row = WEIGHTS["leres"]
        path = tmp_path / row.repo / row.file
        path.parent.mkdir(parents=True)
        torch.save({"depth_model": {f"module.{name}": torch.zeros(1) for name in library}}, path)
        made = convert(WeightStore(tmp_path, {**WEIGHTS, "leres": replace(row, sha256=sha256(path))}), "leres")
        assert made is not None
        with safe_open(made, framework="pt") as file:
            assert set(file.keys()) == set(library) == set(ours)

    def test_what_openpose_does_not_need_is_left_alone(self, tmp_path: Path) -> None:
        """As ``util.transfer`` of controlnet-aux, which takes what the network has from the file."""
        path = tmp_path / "hand_pose_model.safetensors"
        save_file(published_state("openpose_hand") | {"Mconv8_stage7.weight": torch.zeros(1)}, path)
        assert not networks.openpose_hand(path).training

    def test_another_file_is_not_read(self, tmp_path: Path) -> None:
        write_pickle(tmp_path, "pidinet")
        with pytest.raises(UnsafeModel, match="as published"):
            convert(WeightStore(tmp_path), "pidinet")
        assert WeightStore(tmp_path).served("pidinet") is None

    @pytest.mark.parametrize("harmful", [True, False])
    def test_what_is_not_only_tensors_is_refused_and_not_run(self, tmp_path: Path, harmful: bool) -> None:
        row = WEIGHTS["mlsd"]
        path = tmp_path / row.repo / row.file
        path.parent.mkdir(parents=True)
        marker = tmp_path / "ran"
        if harmful:
            path.write_bytes(pickle.dumps(_Harm(str(marker))))
        else:
            torch.save({"epoch": 3}, path)
        store = WeightStore(tmp_path, {**WEIGHTS, "mlsd": replace(row, sha256=sha256(path))})
        with pytest.raises(UnsafeModel if harmful else ModelLoadFailed):
            convert(store, "mlsd")
        assert not marker.exists()

    def test_a_pickle_without_a_known_hash_needs_a_word(self, tmp_path: Path) -> None:
        write_transformer(tmp_path, "zoe")
        (model,) = tmp_path.rglob("model.safetensors")
        from safetensors.torch import load_file

        torch.save(load_file(model), model.with_name("pytorch_model.bin"))
        model.unlink()
        store = WeightStore(tmp_path)
        with pytest.raises(UnsafeModel, match="--allow-unpinned"):
            convert(store, "zoe")
        assert convert(store, "zoe", allow_unpinned=True) == tmp_path / "Intel" / "zoedepth-nyu" / "model.safetensors"
        assert verify(store, "zoe").path == tmp_path / "Intel" / "zoedepth-nyu" / "model.safetensors"

    @pytest.mark.parametrize("kept", [0, 1, 100, 5000])
    def test_an_empty_file_and_one_cut_short_are_told(self, tmp_path: Path, kept: int) -> None:
        row = write_pickle(tmp_path, "mlsd")
        path = tmp_path / row.repo / row.file
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises((ModelLoadFailed, UnsafeModel), match=r"mlsd_large_512_fp32.pth: .*: \S"):
            convert(WeightStore(tmp_path, {**WEIGHTS, "mlsd": replace(row, sha256=sha256(path))}), "mlsd")

    def test_a_pickle_without_its_configuration_leaves_nothing_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "models--Intel--zoedepth-nyu" / "snapshots" / ("f" * 40) / "pytorch_model.bin"
        path.parent.mkdir(parents=True)
        torch.save({"weight": torch.zeros(1)}, path)
        reference = tmp_path / "models--Intel--zoedepth-nyu" / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text("f" * 40)
        with pytest.raises(ModelLoadFailed, match=r"config.json is not beside .*weights fetch zoe"):
            convert(WeightStore(tmp_path), "zoe", allow_unpinned=True)
        assert not (tmp_path / "Intel").exists()

    def test_half_a_file_is_never_served(self, tmp_path: Path) -> None:
        store = WeightStore(tmp_path, {**WEIGHTS, "mlsd": write_pickle(tmp_path, "mlsd")})
        folder = tmp_path / store.row("mlsd").repo
        (folder / "mlsd_large_512_fp32.safetensors").mkdir()  # nothing can be renamed to it
        with pytest.raises(OSError, match=r"."):
            convert(store, "mlsd")
        assert sorted(path.name for path in folder.iterdir()) == [
            "mlsd_large_512_fp32.pth",
            "mlsd_large_512_fp32.safetensors",
        ]


class _Harm:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


class TestVerify:
    def test_what_was_not_made_of_the_published_file_is_found(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, "pidinet")
        assert verify(store, "pidinet").compared
        with pytest.raises(UnsafeModel, match="as published"):
            verify(WeightStore(tmp_path), "pidinet")

    def test_another_networks_weights_are_found(self, tmp_path: Path) -> None:
        store = make_store(tmp_path, "pidinet")
        path = store.served("pidinet")
        assert path is not None
        row = replace(store.row("pidinet"), file="mlsd_large_512_fp32.pth")
        path.rename(path.with_name(row.served))
        with pytest.raises(ModelLoadFailed, match="missing"):
            verify(WeightStore(tmp_path, {**WEIGHTS, "mlsd": row}), "mlsd")


def test_every_pickle_has_a_random_twin() -> None:
    assert set(PICKLES) == {name for name, row in WEIGHTS.items() if row.is_pickle}
