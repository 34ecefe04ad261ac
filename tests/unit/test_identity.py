"""What makes a run this run: each ingredient that changes a result makes another, and nothing else does.

No Ray: everything here happens before any work. The backbone is ``tiny`` with random weights; nothing is faked.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ais.backbones import load_backbone
from ais.command_line import load_config
from ais.config import HeatmapsConfig
from ais.errors import ConfigError, RunError, StorageError
from ais.heads import HeadEnsemble, RegressionHead, read_record, save_head
from ais.importance import ImportanceRecord, save_importance
from ais.pipeline.finish import report_complete
from ais.pipeline.prepare import Prepared, prepare_heatmaps, set_out
from ais.storage import Storage
from tests.tiny import TINY


def save(folder: Path, *, seed: int = 3, mode: str = "center_crop", fit: int = 0) -> None:
    torch.manual_seed(fit)
    heads = HeadEnsemble([RegressionHead(TINY.embedding_size, hidden=4)])
    save_head(str(folder), heads, load_backbone(TINY, weights="random", seed=seed), mode, {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, heads that differ in one thing each, and two AIS."""
    root = tmp_path_factory.mktemp("identity")
    for folder in ("images", "others"):
        (root / folder).mkdir()
        Image.new("RGB", (40, 40)).save(root / folder / "a.png")
    save(root / "head")
    save(root / "refitted", fit=1)
    save(root / "letterboxed", mode="letterbox")
    save(root / "reseeded", seed=4)
    made, _ = read_record(str(root / "head"), Storage())
    for number, name in enumerate(("first", "second")):
        record = ImportanceRecord("error", "tiny", made.weights_fingerprint, "features.6", "center_crop", made.sha256)
        ais = np.random.default_rng(number).normal(size=8)
        save_importance(str(root / name), pa.table({"map": range(8), "ais": ais}), record, {}, Storage())
    return root


def prepared(root: Path, output: Path, *overrides: str) -> Prepared:
    usual = [f"images={root}/images", f"output={output}", f"head={root}/head"]
    arguments = [*usual, *(override.format(root=root) for override in overrides)]
    return prepare_heatmaps(load_config(HeatmapsConfig, arguments, doc="").config)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["images={root}/others"], {"images"}),
        (["head={root}/refitted"], {"head"}),
        (["head={root}/letterboxed"], {"preprocessing"}),
        (["head={root}/reseeded"], {"weights"}),
        (["backbone.layer=features.3"], {"layer"}),
        (["importance={root}/first"], {"importance"}),
        (["weighting=signed"], {"weighting"}),
        (["compute.precision=bfloat16"], {"precision"}),
        (["limits.max_bytes=1000"], {"limits"}),
        (["limits.max_pixels=1000"], {"limits"}),
        (["png.select=none"], {"png"}),
        (["png.max_side=64"], {"png"}),
        (["png.kind=both"], {"png"}),
    ],
)
def test_each_ingredient_makes_another_run(root: Path, tmp_path: Path, overrides: list[str], changed: set[str]) -> None:
    usual, other = prepared(root, tmp_path), prepared(root, tmp_path, *overrides)
    assert {key for key in usual.identity if usual.identity[key] != other.identity[key]} == changed
    assert usual.run.run_id != other.run.run_id
    # Under a name that is given, it is refused before any work, and nothing of the first run changes.
    set_out(prepared(root, tmp_path, "run_id=mine"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="run_id: 'mine' exists and was made of something else") as refused:
        set_out(prepared(root, tmp_path, "run_id=mine", *overrides))
    for key in changed:
        assert f"\n  {key}: " in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["identity", "ignored"])
def test_a_record_of_another_version_is_refused(root: Path, tmp_path: Path, key: str) -> None:
    run = prepared(root, tmp_path, "run_id=mine").run
    set_out(prepared(root, tmp_path, "run_id=mine"))
    record = json.loads((run.folder / "run.json").read_bytes())
    del record[key]
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"run_id: 'mine' exists, and its run\.json is not as this version writes it"):
        set_out(prepared(root, tmp_path, "run_id=mine"))


def test_a_summary_of_another_version_is_refused(root: Path, tmp_path: Path) -> None:
    set_out(prepared(root, tmp_path))
    with pytest.raises(RunError, match=r"summary\.json' is not as this version writes it, it lacks 'finished_at'"):
        report_complete(prepared(root, tmp_path), {"images": 1})


def test_a_backbone_that_does_not_go_with_the_head(root: Path, tmp_path: Path) -> None:
    """Keys that are each possible: what is not given is as the head was trained, with random weights here."""
    with pytest.raises(
        ConfigError, match=r"backbone\.sha256: random weights .*as the head was trained, weights='random'"
    ):
        prepared(root, tmp_path, f"backbone.sha256={'0' * 64}")
    record = json.loads((root / "head" / "head.json").read_text())
    head = tmp_path / "published"
    shutil.copytree(root / "head", head)
    (head / "head.json").write_text(json.dumps({**record, "weights": "published", "seed": None}))
    with pytest.raises(ConfigError, match=r"backbone\.seed: 3 goes only with backbone\.weights=random"):
        prepared(root, tmp_path, f"head={head}", "backbone.seed=3")


def test_an_importance_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    for name in ("importance.json", "importance.parquet"):
        bundle = tmp_path / name
        shutil.copytree(root / "first", bundle)
        (bundle / name).unlink()
        (bundle / name).mkdir()
        with pytest.raises(StorageError, match="cannot be read: IsADirectoryError"):
            prepared(root, tmp_path, f"importance={bundle}")


def test_another_ais_of_the_same_address_is_another_run(root: Path, tmp_path: Path) -> None:
    first, second = (prepared(root, tmp_path, f"importance={root}/{name}") for name in ("first", "second"))
    assert first.identity["importance"] != second.identity["importance"]


def test_how_the_work_is_done_is_not_what_it_is(root: Path, tmp_path: Path) -> None:
    how = (
        *("compute.batch_size=3", "compute.fetch_threads=2", "compute.chunk=2", "compute.device=cpu", "shard_rows=7"),
        *("storage.max_connections=3", "max_error_share=0.5", "repair=true"),
    )
    assert prepared(root, tmp_path).identity == prepared(root, tmp_path, *how).identity
    assert prepared(root, tmp_path).run.run_id == prepared(root, tmp_path, *how).run.run_id


def test_the_first_listing_holds(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40)).save(images / "a.png")
    run = prepared(root, tmp_path / "out", f"images={images}")
    record = set_out(run)
    Image.new("RGB", (40, 40)).save(images / "b.png")
    assert set_out(prepared(root, tmp_path / "out", f"images={images}")) == record
    manifest = pq.read_table(run.run.manifest.path)
    assert [Path(uri).name for uri in manifest["uri"].to_pylist()] == ["a.png"]
    assert manifest["size"].to_pylist() == [(images / "a.png").stat().st_size]
    assert manifest["mtime"].to_pylist() == [(images / "a.png").stat().st_mtime]
    again = set_out(prepared(root, tmp_path / "out", f"images={images}", "run_id=new"))
    assert again["images"] == 2
