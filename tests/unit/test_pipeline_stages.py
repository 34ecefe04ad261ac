"""The stages of the heatmaps pipeline, called directly: everything they do that needs no Ray.

Two things are faked: faults of a filesystem, and the context in which Ray calls a sink.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import ais.storage
from ais import Explainer, HeadEnsemble, RegressionHead, load_backbone, load_head
from ais.backbones import Backbone
from ais.config import PngSelection
from ais.errors import ConfigError, HeadError, ImageError, LeaseLostError, RunError, WeightsError
from ais.explainer import geometry_of
from ais.heads import HeadSource, read_record, save_head
from ais.heatmaps import HeatmapCells
from ais.images import Limits, decode_image
from ais.lease import hold
from ais.pipeline.columns import pack, replace, unpack
from ais.pipeline.explain import BackboneSource, Explain, choose_device
from ais.pipeline.fetch import FetchDecode, Pictures, read_image
from ais.pipeline.manifest import ManifestSource, versions_of
from ais.pipeline.render import Render
from ais.pipeline.sink import RunSink
from ais.runs import ERRORS_SCHEMA, MANIFEST_SCHEMA, Run, results_schema, write_table
from ais.storage import Storage
from tests.tiny import TINY
from tests.zoo import ZOO_LIMITS, write_zoo

STORAGE = Storage()
GEOMETRY = geometry_of(TINY, "center_crop")
MAPS = (8, 8)
CELLS = HeatmapCells(MAPS, (-1.5, -1.5, 30.5, 30.5), 32)


def manifest_of(*uris: Path | str) -> pa.Table:
    count = len(uris)
    sizes, etags = pa.nulls(count, pa.int64()), pa.nulls(count, pa.string())
    return pa.table({"image_id": range(count), "uri": [str(uri) for uri in uris], "size": sizes, "etag": etags})


def fetch_stage(limits: Limits = ZOO_LIMITS, pictures: Pictures | None = None) -> FetchDecode:
    return FetchDecode(GEOMETRY, limits, STORAGE, threads=4, pictures=pictures)


def fetch_decode(*uris: Path | str, limits: Limits = ZOO_LIMITS, pictures: Pictures | None = None) -> pa.Table:
    return fetch_stage(limits, pictures)(manifest_of(*uris))


def outcomes(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True))


def noise(path: Path, width: int, height: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)  # blotches that survive a resize
    Image.fromarray(levels).resize((width, height)).save(path)
    return path


class TestColumns:
    @pytest.mark.parametrize(("shape", "dtype"), [((5, 4, 3), np.uint8), ((5, 4), np.float32), ((0, 4, 3), np.uint8)])
    def test_round_trip(self, shape: tuple[int, ...], dtype: type) -> None:
        array: np.ndarray = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        column = pa.chunked_array([pack(array)])
        assert column.type == pa.binary(int(np.prod(shape[1:])) * array.itemsize)
        found = unpack(column, shape[1:], dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)

    def test_slices_chunks_and_columns_of_no_chunk(self) -> None:
        array = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
        table = pa.table({"array": pack(array)})
        np.testing.assert_array_equal(unpack(table.slice(3, 4)["array"], (2, 3), np.float32), array[3:7])
        joined = pa.concat_tables([table.slice(7), table.slice(0, 0), table.slice(1, 2)])
        np.testing.assert_array_equal(unpack(joined["array"], (2, 3), np.float32), array[[7, 8, 9, 1, 2]])
        kept = table.filter(pa.array([True, False] * 5))
        np.testing.assert_array_equal(unpack(kept["array"], (2, 3), np.float32), array[::2])
        assert unpack(pa.chunked_array([], pa.binary(24)), (2, 3), np.float32).shape == (0, 2, 3)

    def test_packs_what_is_not_contiguous(self) -> None:
        array = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
        np.testing.assert_array_equal(unpack(pa.chunked_array([pack(array)]), (3,), np.float32), array)

    def test_replace(self) -> None:
        table = replace(pa.table({"a": [1], "b": [2], "c": [3]}), ["a"], b=pa.array(["x"]), d=pa.array([4]))
        assert table.to_pydict() == {"c": [3], "b": ["x"], "d": [4]}


class TestPictures:
    def test_a_sample_is_about_its_share_and_always_the_same(self) -> None:
        # Of 20,000 fair draws the share is within 0.015 (over four standard deviations).
        for share in (0.1, 0.5):
            pictures = Pictures(PngSelection("sample", share=share), 64)
            wanted = [pictures.wanted(image_id) for image_id in range(20_000)]
            assert np.mean(wanted) == pytest.approx(share, abs=0.015)
            assert wanted == [pictures.wanted(image_id) for image_id in range(20_000)]
        few = {n for n in range(100) if Pictures(PngSelection("sample", share=0.1), 64).wanted(n)}
        more = {n for n in range(100) if Pictures(PngSelection("sample", share=0.3), 64).wanted(n)}
        assert few < more

    def test_all_none_and_everything_sampled(self) -> None:
        assert Pictures(PngSelection("all"), 64).wanted(7)
        assert not Pictures(PngSelection("top", count=3), 64).wanted(7)
        assert all(Pictures(PngSelection("sample", share=1.0), 64).wanted(n) for n in range(1000))


class TestFetchDecode:
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Image size")
    def test_every_file_of_the_zoo_becomes_pixels_or_a_row_with_its_reason(self, tmp_path: Path) -> None:
        cases = write_zoo(tmp_path)
        table = fetch_decode(*(case.path for case in cases))
        found, expected = {}, {}
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        for case, outcome, size in zip(cases, outcomes(table), sizes, strict=True):
            found[case.name] = (*outcome, size)
            refused = "" if case.expect == "ok" else "decode", "" if case.expect == "ok" else case.expect.value
            expected[case.name] = (*refused, case.size or (0, 0))
        assert found == expected
        pixels, boxes = unpack(table["pixels"], (32, 32, 3), np.uint8), unpack(table["box"], (4,), np.float32)
        for index, case in enumerate(cases):
            if case.expect == "ok":
                apart, box = GEOMETRY.apply(decode_image(case.path.read_bytes(), ZOO_LIMITS))
                np.testing.assert_array_equal(pixels[index], apart, err_msg=case.name)
                np.testing.assert_array_equal(boxes[index], box, err_msg=case.name)
            else:
                assert not pixels[index].any(), case.name

    def test_what_is_not_there_or_not_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "folder.jpg").mkdir()
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "vanished")
        good = noise(tmp_path / "good.png", 40, 30, 0)
        names = ("folder.jpg", "pipe.jpg", "nowhere.jpg", "vanished.jpg")
        table = fetch_decode(*(tmp_path / name for name in names), "/dev/zero", good)
        assert outcomes(table) == [
            ("fetch", "not a file"),
            ("fetch", "not a file"),
            ("fetch", "not found"),
            ("fetch", "not found"),
            ("fetch", "not a file"),
            ("", ""),
        ]
        assert "vanished.jpg" in table["error"][3].as_py()

    def test_permission_denied(self) -> None:
        with tempfile.TemporaryDirectory(prefix="ais-") as folder:
            Path(folder).chmod(0o755)
            good, closed = noise(Path(folder) / "good.png", 40, 30, 0), noise(Path(folder) / "closed.png", 40, 30, 1)
            good.chmod(0o644)
            closed.chmod(0)
            # In a process that is not root, for whom permissions mean something.
            script = (
                "import os\n"
                "from tests.unit.test_pipeline_stages import fetch_stage, manifest_of, outcomes\n"
                "stage = fetch_stage()\n"
                f"stage(manifest_of({str(good)!r}))\n"  # the interpreter may be out of reach later
                "if os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
                f"print(outcomes(stage(manifest_of({str(good)!r}, {str(closed)!r}))))"
            )
            command = [sys.executable, "-c", script]
            root = Path(__file__).parents[2]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.stdout == "[('', ''), ('fetch', 'permission denied')]\n", done.stderr

    def test_too_many_bytes_are_not_read(self, tmp_path: Path) -> None:
        path = noise(tmp_path / "a.png", 64, 64, 0)
        size = path.stat().st_size
        with pytest.raises(ImageError, match=f"too many bytes: {size:,} bytes, the limit is {size - 1:,}"):
            read_image(str(path), size, Limits(max_bytes=size - 1), STORAGE)
        assert read_image(str(path), size, Limits(max_bytes=size), STORAGE) == path.read_bytes()
        # A listing may not say the size: then one byte more than the limit is read, enough to refuse it.
        assert len(read_image(str(path), None, Limits(max_bytes=100), STORAGE)) == 101

    def test_a_file_that_changed_since_it_was_listed_is_not_read(self, tmp_path: Path) -> None:
        path = noise(tmp_path / "a.png", 64, 64, 0)
        size, mtime = path.stat().st_size, path.stat().st_mtime
        assert read_image(str(path), size, Limits(), STORAGE, mtime=mtime) == path.read_bytes()
        assert read_image(str(path), size, Limits(), STORAGE, mtime=float(int(mtime)))  # lists may give whole seconds
        with pytest.raises(ImageError, match=r"changed since it was listed: it was last changed at .*, and is at "):
            read_image(str(path), size, Limits(), STORAGE, mtime=mtime - 0.25)
        with pytest.raises(ImageError, match=f"changed since.*: it had {size + 1:,} bytes, and has {size:,}"):
            read_image(str(path), size + 1, Limits(), STORAGE)
        table = manifest_of(path, path).append_column("mtime", pa.array([mtime, mtime - 9]))
        fetched = fetch_stage()(table)
        assert [reason for _, reason in outcomes(fetched)] == ["", "changed since it was listed"]
        assert "mtime" not in fetched.column_names

    def test_pictures_come_along_for_those_wanted(self, tmp_path: Path) -> None:
        paths = [noise(tmp_path / f"{n}.png", 100, 50, n) for n in range(8)]
        pictures = Pictures(PngSelection("sample", share=0.5), max_side=20)
        table = fetch_decode(*paths, tmp_path / "missing.png", pictures=pictures)
        wanted = [pictures.wanted(n) for n in range(8)] + [False]
        assert [data is not None for data in table["picture"].to_pylist()] == wanted
        assert table["picture_width"].to_pylist() == [20 * want for want in wanted]
        assert table["picture_height"].to_pylist() == [10 * want for want in wanted]
        assert {len(data) for data in table["picture"].to_pylist() if data} == {20 * 10 * 3}
        assert 0 < sum(wanted) < 8


class Faults:
    """Makes fsspec's filesystem in memory raise ``error`` from ``open`` so many times before it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception = OSError()
        self.left = 0
        answer = MemoryFileSystem._open

        def fail_or_answer(filesystem: MemoryFileSystem, *args: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                raise self.error
            return answer(filesystem, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, "_open", fail_or_answer)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setattr(ais.storage, "_FIRST_WAIT_S", 0.001)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/image", b"content")
    yield Faults(monkeypatch)
    memory.rm_file("/image")


class TestRetries:
    @pytest.mark.parametrize("error", [TimeoutError("slow down"), ConnectionResetError(), OSError(5, "I/O error")])
    def test_passing_faults_are_tried_again(self, faults: Faults, error: Exception) -> None:
        faults.error, faults.left = error, 3
        assert read_image("memory://image", None, Limits(), STORAGE) == b"content"
        faults.left = 4
        with pytest.raises(ImageError, match=f"unreadable: {type(error).__name__}"):
            read_image("memory://image", None, Limits(), STORAGE)

    @pytest.mark.parametrize(
        ("error", "reason"), [(FileNotFoundError(), "not found"), (PermissionError(), "permission denied")]
    )
    def test_what_will_not_change_is_not(self, faults: Faults, error: Exception, reason: str) -> None:
        faults.error, faults.left = error, 2
        with pytest.raises(ImageError, match=reason):
            read_image("memory://image", None, Limits(), STORAGE)
        assert faults.left == 1


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(TINY, weights="random", seed=3)


def heads() -> HeadEnsemble:
    torch.manual_seed(0)
    return HeadEnsemble(RegressionHead(TINY.embedding_size, hidden=32, target_mean=5, target_std=2) for _ in range(2))


def explain_stage(head: Path, backbone: Backbone, **options: Any) -> Explain:
    source = BackboneSource(TINY, None, "random", 3, None, backbone.weights.fingerprint, STORAGE)
    given: dict[str, Any] = {"importance": None, "weighting": "positive", "precision": "float32", **options}
    head_source = HeadSource(str(head), read_record(str(head))[0].sha256, STORAGE)
    return Explain(source, head_source, preprocessing="center_crop", device="cpu", threads=None, chunk=None, **given)


class TestExplain:
    @pytest.mark.parametrize("weighting", ["positive", "signed"])
    def test_equals_the_library_and_passes_errors_through(
        self, tmp_path: Path, backbone: Backbone, weighting: Any
    ) -> None:
        save_head(str(tmp_path / "head"), heads(), backbone, "center_crop", {})
        paths = [noise(tmp_path / f"{n}.png", 40 + 9 * n, 64, n) for n in range(5)]
        batch = fetch_decode(*paths[:2], tmp_path / "missing.png", *paths[2:])
        table = explain_stage(tmp_path / "head", backbone, weighting=weighting)(batch)
        images = [decode_image(path.read_bytes()) for path in paths]
        expected = Explainer(backbone, load_head(str(tmp_path / "head")), weighting=weighting)(images)
        good = [0, 1, 3, 4, 5]
        # Measured: equal to the last bit, as the batch is the same.
        scores, heatmaps = table["score"].to_numpy(), unpack(table["heatmap"], MAPS, np.float32)
        np.testing.assert_allclose(scores[good], expected.scores, rtol=1e-6)
        np.testing.assert_allclose(heatmaps[good], expected.heatmaps, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(table["score_std"].to_numpy()[good], expected.score_stds, rtol=1e-5)
        assert (table["score_std"][2].as_py(), np.isnan(scores[2]), heatmaps[2].any()) == (None, True, False)
        assert outcomes(table) == [("", ""), ("", ""), ("fetch", "not found"), ("", ""), ("", ""), ("", "")]
        assert "pixels" not in table.column_names
        assert (heatmaps[good].min() < 0) == (weighting == "signed")

    def test_an_ais_vector_for_all_images(self, tmp_path: Path, backbone: Backbone) -> None:
        save_head(str(tmp_path / "head"), HeadEnsemble(heads().variants[:1]), backbone, "center_crop", {})
        importance = np.zeros(8, np.float32)
        importance[3] = 2.0
        path = noise(tmp_path / "a.png", 64, 64, 0)
        table = explain_stage(tmp_path / "head", backbone, importance=importance)(fetch_decode(path))
        maps = Explainer(backbone, heads())([decode_image(path.read_bytes())]).feature_maps
        heatmap = unpack(table["heatmap"], MAPS, np.float32)[0]
        np.testing.assert_allclose(heatmap, maps[0, 3].relu(), rtol=1e-6)
        assert table["score_std"].to_pylist() == [None]  # of a single head

    def test_a_batch_of_nothing_but_errors(self, tmp_path: Path, backbone: Backbone) -> None:
        save_head(str(tmp_path / "head"), heads(), backbone, "center_crop", {})
        table = explain_stage(tmp_path / "head", backbone)(fetch_decode(tmp_path / "a", tmp_path / "b"))
        assert outcomes(table) == [("fetch", "not found")] * 2
        assert table["heatmap"].type == pa.binary(8 * 8 * 4)

    def test_a_score_that_is_not_finite_becomes_an_error_of_its_image_alone(
        self, tmp_path: Path, backbone: Backbone
    ) -> None:
        paths = [noise(tmp_path / f"{n}.png", 64, 64, n) for n in range(16)]
        images = [decode_image(path.read_bytes()) for path in paths]
        torch.manual_seed(0)
        head = RegressionHead(TINY.embedding_size, hidden=32)
        scores = Explainer(backbone, head).score(images)
        with torch.no_grad():
            for parameter in head.output.parameters():
                parameter.div_(scores.abs().median())
        head.target_std.fill_(3.4e38)  # what is over the median overflows float32
        save_head(str(tmp_path / "head"), HeadEnsemble([head]), backbone, "center_crop", {})
        table = explain_stage(tmp_path / "head", backbone)(fetch_decode(*paths))
        overflows = (scores.abs() > scores.abs().median()).numpy()
        assert overflows.sum() == 8
        failed = np.array([stage == "score" for stage, _ in outcomes(table)])
        np.testing.assert_array_equal(failed, overflows)
        assert {outcome for outcome, bad in zip(outcomes(table), failed, strict=True) if bad} == {
            ("score", "not finite")
        }
        assert np.isfinite(table["score"].to_numpy()[~failed]).all()

    def test_refuses_another_head_than_the_driver_saw(self, tmp_path: Path, backbone: Backbone) -> None:
        address = str(tmp_path / "head")
        save_head(address, heads(), backbone, "center_crop", {})
        seen = HeadSource(address, read_record(address)[0].sha256, STORAGE)
        assert seen.load().record == read_record(address)[0]
        save_head(address, HeadEnsemble([RegressionHead(TINY.embedding_size)]), backbone, "center_crop", {})
        with pytest.raises(HeadError, match=f"the job started with {seen.sha256}: it was replaced meanwhile"):
            Explain(
                BackboneSource(TINY, None, "random", 3, None, backbone.weights.fingerprint, STORAGE),
                seen,
                preprocessing="center_crop",
                device="cpu",
                threads=None,
                precision="float32",
            )

    def test_refuses_other_weights_than_the_driver_saw(self, backbone: Backbone) -> None:
        source = BackboneSource(TINY, None, "random", 4, None, backbone.weights.fingerprint, STORAGE)
        with pytest.raises(WeightsError, match=f"the driver saw {backbone.weights.fingerprint}"):
            source.load("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute\.device: cuda, and this machine has no GPU .*set cpu or auto"):
        choose_device("cuda")


class TestManifestSource:
    def parts(self, tmp_path: Path, *rows: int) -> Run:
        run = Run.at(str(tmp_path), "r", STORAGE)
        first = 0
        for part, count in enumerate(rows):
            ids = pa.array(range(first, first + count))
            uris = [f"/i/{n}.png" for n in ids.to_pylist()]
            nulls = (pa.nulls(count, pa.int64()), pa.nulls(count, pa.string()), pa.nulls(count, pa.float64()))
            write_table(
                run.manifest / f"part-{part:05d}.parquet", pa.table([ids, uris, *nulls], schema=MANIFEST_SCHEMA)
            )
            first += count
        return run

    def test_reads_what_is_not_done_in_units_of_a_batch(self, tmp_path: Path) -> None:
        run = self.parts(tmp_path, 9000, 7, 5000)  # over one and two row groups
        done = np.random.default_rng(0).random(14_007) < 0.5
        done[2000:4000] = True  # two whole units
        source = ManifestSource(run.manifest, done, batch=1000)
        tasks = source.get_read_tasks(-1)
        assert len(tasks) == 9 - 2 + 1 + 5
        blocks = [[block.to_pydict() for block in task()] for task in tasks]
        ids = [image_id for unit in blocks for block in unit for image_id in block["image_id"]]
        assert ids == np.flatnonzero(~done).tolist()
        assert [uri for unit in blocks for block in unit for uri in block["uri"]] == [f"/i/{n}.png" for n in ids]
        assert [task.metadata.num_rows for task in tasks] == [len(unit[0]["image_id"]) for unit in blocks]
        assert source.estimate_inmemory_data_size() == 200 * len(ids)

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        run = self.parts(tmp_path, 10)
        assert ManifestSource(run.manifest, np.ones(10, bool), batch=4).get_read_tasks(-1) == []

    def test_a_damaged_part_is_named(self, tmp_path: Path) -> None:
        run = self.parts(tmp_path, 10)
        part = Path(run.manifest.path) / "part-00000.parquet"
        part.write_bytes(part.read_bytes()[:-9])
        with pytest.raises(RunError, match=r"part-00000\.parquet' cannot be read: .*bring it back, or give"):
            ManifestSource(run.manifest, np.zeros(10, bool), batch=4)
        with pytest.raises(RunError, match=r"part-00000\.parquet' cannot be read"):
            versions_of(run.manifest, np.array([3]))

    def test_the_number_of_units_is_bounded(self, tmp_path: Path) -> None:
        run = self.parts(tmp_path, 45_000)
        tasks = ManifestSource(run.manifest, np.zeros(45_000, bool), batch=1).get_read_tasks(-1)
        assert len(tasks) == 15_000
        assert {task.metadata.num_rows for task in tasks} == {3}


class TestRenderAndSink:
    SAMPLE = PngSelection("sample", share=0.8)
    METADATA: ClassVar = {"ais.backbone": "tiny", "ais.untrained": "the backbone has random weights, seed 3"}

    @pytest.fixture
    def explained(self, tmp_path: Path, backbone: Backbone) -> pa.Table:
        save_head(str(tmp_path / "head"), heads(), backbone, "center_crop", {})
        paths = [noise(tmp_path / f"{n} ü.png", 90, 60, n) for n in (0, 1, 2, 4)]
        pictures = Pictures(self.SAMPLE, max_side=30)
        batch = fetch_decode(*paths[:3], tmp_path / "missing.png", *paths[3:], pictures=pictures)
        return explain_stage(tmp_path / "head", backbone)(batch)

    def test_shards_of_one_task(self, tmp_path: Path, explained: pa.Table) -> None:
        rendered = Render(CELLS, "positive", "overlay", self.METADATA)(explained)
        run = Run.at(str(tmp_path), "r", STORAGE)
        sink = RunSink(run, CELLS, self.METADATA, shard_rows=64)
        context = SimpleNamespace(kwargs={"write_uuid": "0123456789abcdef"}, task_idx=3)
        seconds = sink.write([rendered.slice(0, 2), rendered.slice(2, 0), rendered.slice(2)], context)
        sink.write([rendered], context)  # a task that Ray runs again replaces what it wrote
        folder = tmp_path / "runs" / "r"
        written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        name = "part-01234567-000003"
        tars = [path for path in written if path.startswith("png/")]
        assert written == [f"errors/{name}.parquet", *tars, f"results/{name}.parquet"]
        assert set(seconds) == {"fetch_s", "decode_s", "explain_s", "render_s"}
        assert all(value > 0 for value in seconds.values())

        errors = pq.read_table(folder / "errors" / f"{name}.parquet")
        assert errors.schema.equals(ERRORS_SCHEMA)
        assert errors["image_id"].to_pylist() == [3]
        assert errors["reason"].to_pylist() == ["not found"]
        results = pq.read_table(folder / "results" / f"{name}.parquet")
        assert results.schema.equals(results_schema(MAPS))
        metadata = {key.decode(): text.decode() for key, text in results.schema.metadata.items()}
        tar = metadata["ais.png"]
        assert len(tars) == 2  # of two attempts, of which the results name the last
        assert f"png/{tar}" in tars
        assert metadata == self.METADATA | {
            "ais.png": tar,
            "ais.png_bytes": str((folder / "png" / tar).stat().st_size),
            "ais.png_sha256": hashlib.sha256((folder / "png" / tar).read_bytes()).hexdigest(),
        }
        assert results["image_id"].to_pylist() == [0, 1, 2, 4]
        wanted = [Pictures(self.SAMPLE, 30).wanted(n) for n in (0, 1, 2, 4)]
        assert 1 < sum(wanted) < 4
        assert results["png"].to_pylist() == [tar if want else None for want in wanted]
        # The crop is 32 / 36 of 60 pixels wide; one pixel of the input is 5 / 3 of the original's.
        np.testing.assert_allclose(results["box"].to_pylist(), 4 * [[55 / 3, 10 / 3, 215 / 3, 170 / 3]], rtol=1e-6)
        cells = [55 / 3 - 2.5, 10 / 3 - 2.5, 215 / 3 - 2.5, 170 / 3 - 2.5]
        np.testing.assert_allclose(results["heatmap_box"].to_pylist(), 4 * [cells], rtol=1e-6)
        heatmaps = results["heatmap"].combine_chunks().to_numpy_ndarray()
        np.testing.assert_array_equal(heatmaps, unpack(explained["heatmap"], MAPS, np.float32)[[0, 1, 2, 4]])
        with tarfile.open(folder / "png" / tar) as archive:
            ids = [image_id for image_id, want in zip((0, 1, 2, 4), wanted, strict=True) if want]
            assert archive.getnames() == [f"{image_id}.png" for image_id in ids]
            member = archive.extractfile(archive.getnames()[0])
            assert member is not None
            picture = Image.open(io.BytesIO(member.read()))
        assert picture.size == (30, 20)
        assert picture.text["ais.untrained"] == self.METADATA["ais.untrained"]  # type: ignore[attr-defined]
        assert picture.text["image"].endswith(f"{ids[0]} ü.png")  # type: ignore[attr-defined]

    def test_nothing_is_written_once_another_start_has_the_run(self, tmp_path: Path, explained: pa.Table) -> None:
        rendered = Render(CELLS, "positive", "overlay", self.METADATA)(explained)
        context = SimpleNamespace(kwargs={"write_uuid": "0123456789abcdef"}, task_idx=3)
        folder = Run.at(str(tmp_path), "r", STORAGE).folder
        with hold(folder) as lease:
            run = pickle.loads(pickle.dumps(Run(folder, lease.fence)))  # as it travels to workers
            RunSink(run, CELLS, self.METADATA, shard_rows=64).write([rendered.slice(0, 2)], context)
            (folder / "lock" / "000002.json").write_text("{}")  # what a start leaves that takes over
            before = sorted(tmp_path.rglob("*"))
            context.task_idx = 4
            with pytest.raises(LeaseLostError):
                RunSink(run, CELLS, self.METADATA, shard_rows=64).write([rendered], context)
            for write in (lambda: run.finish({}), lambda: run.recover(9), lambda: run.set_out([], "", {})):
                with pytest.raises(LeaseLostError):
                    write()
            assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(("kind", "size"), [("overlay", (30, 20)), ("heatmap", (30, 20)), ("both", (98, 20))])
    def test_kinds(self, explained: pa.Table, kind: str, size: tuple[int, int]) -> None:
        rendered = Render(CELLS, "positive", kind, self.METADATA)(explained)
        pngs = rendered["png"].to_pylist()
        assert [png is not None for png in pngs] == [data is not None for data in explained["picture"].to_pylist()]
        assert {Image.open(io.BytesIO(png)).size for png in pngs if png} == {size}

    def test_a_task_of_errors_writes_only_errors_and_an_empty_one_nothing(
        self, tmp_path: Path, explained: pa.Table
    ) -> None:
        run = Run.at(str(tmp_path), "r", STORAGE)
        sink = RunSink(run, CELLS, {}, shard_rows=64)
        context = SimpleNamespace(kwargs={"write_uuid": "0123456789abcdef"}, task_idx=0)
        assert sink.write([explained.slice(0, 0)], context) == {}
        assert not (tmp_path / "runs").exists()
        sink.write([explained.slice(3, 1)], context)
        assert [path.name for path in (tmp_path / "runs" / "r").iterdir()] == ["errors"]
