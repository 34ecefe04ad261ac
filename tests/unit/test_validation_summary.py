"""The summary of several validations, on records written here by hand. Nothing else is faked."""

import json
from pathlib import Path

import pytest

from ais.command_line import load_config
from ais.config import ValidateDemoConfig
from ais.errors import AisError
from ais.validation.summary import summarise
from jobs import validate_demo

ROOT = Path(__file__).resolve().parents[2]
HEAD_CHECKS = (
    "RMSE along random",
    "head predicts", "PLCC along random", "ais separates", "ais separates random head", "deletion blurred random",
    "deletion blurred centre", "deletion blurred random head", "pointing random head", "overlap random head",
    "variants random head",
)  # fmt: skip


def write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def head_record(value: float, outcome: str, conclusion: str) -> dict[str, object]:
    correlation = {name: {"value": value} for name in ("positive", "signed")}
    pointing = {name: {"hit_rate": {"value": value}, "chance": 0.0871} for name in ("ais", "random head")}
    return {
        "conclusion": conclusion,
        "checks": [{"name": name, "value": value, "outcome": outcome} for name in HEAD_CHECKS],
        "heatmaps": {
            "random_head_correlation": correlation,
            "variant_correlation": {"positive": {"value": None}, "signed": {"value": None}},
            "pointing": pointing,
        },
    }


def test_every_figure_beside_its_outcome(tmp_path: Path) -> None:
    for backbone in ("one", "two"):
        write(tmp_path / backbone / "validation-true" / "validation.json", head_record(0.934, "shown", "PASSED: all."))
        failed = head_record(-0.0123, "not shown", "FAILED: nothing.")
        write(tmp_path / backbone / "validation-shuffled" / "validation.json", failed)
        checks = [{"name": name, "value": 0.5, "outcome": "against"} for name in ("model agrees", "R² along random")]
        similarity = {"conclusion": "PASSED IN PART: half.", "checks": checks}
        write(tmp_path / backbone / "validation-similarity" / "validation.json", similarity)
    agreement = {metric: {"mean": mean} for metric, mean in (("pearson", 0.31), ("top_overlap", None), ("emd", 0.0042))}
    pair = {"run_a": "one", "run_b": "two", "images": 84, "agreement": agreement}
    write(tmp_path / "comparison" / "summary.json", {"pairs": [pair]})
    text = summarise(tmp_path, ["one", "two"])
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.split("\n")
        if "|" in line
    }
    assert rows["head fitted to ratings"] == ["one, true", "one, shuffled", "two, true", "two, shuffled"]
    assert rows["head predicts ratings of test images: PLCC"] == ["0.93 ✓", "-0.012 –"] * 2
    assert rows["heatmaps with their maximum on the disc (by chance)"][0] == "0.93 (0.087)"
    assert rows["rank correlation between variants, signed"][0] == "–"
    assert rows["model's similarity agrees with the judgments: R"] == ["0.50 ✗", "0.50 ✗"]
    assert rows["one – two (84 images)"] == ["0.31", "–", "0.0042"]
    assert "one, shuffled: FAILED: nothing." in text
    assert (tmp_path / "summary.md").read_text() == text + "\n"


def test_the_demo_says_what_it_would_do_and_does_nothing(capsys, tmp_path: Path) -> None:
    config = ROOT / "configs" / "validate-demo.yaml"
    assert validate_demo.main(["--config", str(config), f"output={tmp_path / 'out'}", "--dry-run"]) == 0
    assert "weighting: signed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    loaded = load_config(ValidateDemoConfig, ["--config", str(config)], doc="").config
    assert loaded == ValidateDemoConfig()
    assert loaded.layers() == {"barlow_twins": None, "efficientnet_b3": None, "densenet161": "features.norm5"}


@pytest.mark.parametrize(
    ("backbones", "message"),
    [
        ("[vgg16,vgg16:features.26]", 'backbones.*"vgg16" is given twice'),
        ("[vgg16,vgg61]", "vgg61"),
        ("[vgg16,densenet161:features.norm6]", "densenet161 has no layer 'features.norm6'; nearest: features.norm5"),
    ],
)
def test_what_the_demo_could_not_do_at_its_end_is_refused_at_its_beginning(backbones, message, tmp_path: Path) -> None:
    with pytest.raises(AisError, match=message):
        validate_demo.main([f"backbones={backbones}", f"output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
