"""The GPU's benchmark on the CPU, small: that it will work where there is a GPU. Nothing is faked, nothing is timed."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu
from tests.tiny import TINY


def test_small_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.run(
        torch.device("cpu"), (TINY.name,), (torch.float32, torch.bfloat16), batch=2, runs=1, side=32, compile=False
    )
    assert [row["precision"] for row in found["rows"]] == ["float32", "bfloat16"]
    assert set(found["ceiling_multiply_adds_per_s"]) == {"float32", "bfloat16"}
    for row in found["rows"]:
        assert row["images_per_pass"] == 2
        assert row["images_per_s"] == pytest.approx(2 / row["batch_s"])
        assert set(row["parts_s"]) == {
            "copy_in", "normalise", "trunk", "tail_and_head", "effects", "heatmap", "copy_out"
        }  # fmt: skip
    # 3 convolutions on 32×32: 16·27·256 + 16·144·256 + 8·144·64 multiply-adds.
    top = found["ceiling_multiply_adds_per_s"]["float32"]
    row = found["rows"][0]
    assert row["ceiling_share"] * top / row["images_per_s"] == pytest.approx(110_592 + 589_824 + 73_728)
    file = gpu.keep(found, tmp_path)
    assert json.loads(file.read_text())["rows"] == found["rows"]
    assert torch.__version__.split("+")[0] in file.name
    assert "bfloat16" in file.with_suffix(".md").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["backbone"] == TINY.name


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
