"""Configurations as a user writes them: files, overrides, mistakes and help. Nothing is faked."""

import hashlib
import importlib
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from ais.command_line import load_config, run_job
from ais.config import (
    BackboneOverrides,
    DemoConfig,
    FitConfig,
    HeatmapsConfig,
    ImportanceConfig,
    PngSelection,
    TrainConfig,
    ValidateConfig,
    config_fingerprint,
)
from ais.errors import (
    ConfigError,
    HeadError,
    ImportanceError,
    LeaseLostError,
    LockedError,
    RatingsError,
    RunError,
    SimilarityError,
    StorageError,
    TerminatedInterrupt,
    WeightsError,
)
from ais.settings import keys_of, parse_config, to_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
HEATMAPS = ["images=photos", "output=out", "head=heads/first"]
TRAIN = ["ratings.path=r.csv", "output=out", "backbone.name=vgg16"]


def problems(model, text="", overrides=()):
    """The lines after the heading of the ConfigError that the configuration gives."""
    with pytest.raises(ConfigError) as caught:
        parse_config(model, text, overrides, source="job.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"{len(lines)} problem")
    return lines


def test_file_and_overrides(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "ratings: {path: s3://r/ratings.csv}\noutput: out\nbackbone:\n  name: vgg16\nfit:\n  epochs: 7\n  seed: 1\n"
    )
    loaded = load_config(TrainConfig, ["fit.seed=2", "--config", str(path), "--dry-run", "fit.seed=3"], doc="Train.")
    assert loaded.dry_run is True
    assert loaded.config.ratings.path == "s3://r/ratings.csv"
    assert (loaded.config.fit.epochs, loaded.config.fit.seed, loaded.config.fit.patience) == (7, 3, 30)
    assert load_config(TrainConfig, [f"--config={path}"], doc="Train.").config.fit.seed == 1


def test_defaults():
    config = parse_config(HeatmapsConfig, "", HEATMAPS)
    assert (config.weighting, config.max_error_share, config.shard_rows) == ("positive", 0.05, 512)
    assert config.backbone == BackboneOverrides()
    assert config.backbone.name is config.preprocessing.mode is config.run_id is None
    assert (config.limits.max_bytes, config.limits.max_pixels) == (67_108_864, 89_478_485)
    demo = parse_config(DemoConfig, "", ["backbone.name=vgg16"])
    assert (demo.backbone.name, demo.backbone.weights, demo.backbone.seed) == ("vgg16", "random", 0)
    assert demo.png.selection == PngSelection("all")


def test_configurations_are_frozen_and_strict_in_python_too():
    with pytest.raises(ValidationError, match="frozen"):
        FitConfig().seed = 1
    with pytest.raises(ValidationError, match="seeds"):
        FitConfig(seeds=1)
    with pytest.raises(ValidationError, match="valid integer"):
        FitConfig(seed=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E2", 100.0), ("+.5", 0.5), ("2.", 2.0), ("3", 3.0), ("0.0", None), ("007", None),
     ("1_0", None), ("0x1", None), ("1:30", None), (".inf", None), (".nan", None), ("true", None),
     ('"1"', None), ("null", None), ("[1]", None), ("1" * 5000, None)],
)  # fmt: skip
def test_numbers(text, value):
    if value is None:
        line = problems(DemoConfig, f"fit: {{learning_rate: {text}}}")[0]
        assert "job.yaml" in line
    else:
        assert parse_config(DemoConfig, f"fit: {{learning_rate: {text}}}").fit.learning_rate == value
        assert parse_config(DemoConfig, "", [f"fit.learning_rate={text}"]).fit.learning_rate == value


@pytest.mark.parametrize("text", ["007", "1:30", "2026-11-23", "yes", "no", "on", "0o7", "1_000"])
def test_text_that_older_yaml_takes_for_something_else(text):
    config = parse_config(HeatmapsConfig, f"images: {text}\noutput: o\nhead: h")
    assert config.images == text
    assert parse_config(HeatmapsConfig, to_yaml(config)) == config


def test_text_overrides_are_raw_and_null_resets():
    overrides = [*HEATMAPS, "run_id=20261123", "importance=1e5", "images=a=b: [*"]
    config = parse_config(HeatmapsConfig, "", overrides)
    assert (config.run_id, config.importance, config.images) == ("20261123", "1e5", "a=b: [*")
    assert parse_config(HeatmapsConfig, to_yaml(config)) == config
    reset = parse_config(
        HeatmapsConfig, "run_id: a\ncompute: {chunk: 3}", [*HEATMAPS, "run_id=null", "compute.chunk=null"]
    )
    assert reset.run_id is reset.compute.chunk is None
    assert problems(HeatmapsConfig, "", [*HEATMAPS, "output=null"]) == [
        "output: expected text, got null (command line)"
    ]


def test_every_problem_is_listed_with_key_value_choices_and_origin():
    text = "\n".join(
        [
            "output: 3",
            "layer: features.28",
            "png:",
            "  kind: overlays",
            "  colour: red",
            "fit: {epochs: 0, dropout: 0.5, patience: true, seed: '3', batch_size: 2.0}",
            "head: 512",
        ]
    )
    overrides = [
        "fit.test_share=2",
        "png=all",
        "fit.learning_rate=fast",
        "backbone.sed=1",
        "verbose",
        "fit.workers=",
    ]
    assert problems(DemoConfig, text, overrides) == [
        "verbose: expected key=value (command line)",
        "fit.workers: no value after =; write fit.workers=null to leave it unset (command line)",
        "layer: unknown key; did you mean backbone.layer? (job.yaml:2)",
        "png.colour: unknown key; the keys of png are select, kind, max_side (job.yaml:5)",
        "fit.dropout: unknown key; did you mean head.dropout? (job.yaml:6)",
        "head: a section, got 512; its keys are hidden, dropout (job.yaml:7)",
        'png: a section, got "all"; its keys are select, kind, max_side (command line)',
        "backbone.sed: unknown key; did you mean backbone.seed? (command line)",
        "output: expected text, got 3; put it in quotes (job.yaml:1)",
        "fit.epochs: expected whole number >= 1, got 0 (job.yaml:6)",
        "fit.patience: expected whole number >= 1, got true (job.yaml:6)",
        "fit.batch_size: expected whole number >= 1, got 2.0 (job.yaml:6)",
        'fit.learning_rate: expected number > 0, got "fast" (command line)',
        "fit.test_share: expected number > 0 and < 0.9, got 2 (command line)",
        'fit.seed: expected whole number >= 0 and <= 4294967295, got "3" (job.yaml:6)',
        'png.kind: expected one of overlay, heatmap, both, got "overlays"; did you mean overlay?'
        " (job.yaml:4)",
    ]  # fmt: skip


def test_missing_keys_name_an_example():
    assert problems(TrainConfig) == [
        "ratings.path: required and not given; expected text, for example ratings.path=ratings.csv",
        "output: required and not given; expected text, for example output=heads/first",
        "backbone.name: required and not given; expected text, for example backbone.name=resnet152",
    ]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("imagess", "images"), ("backbon.layer", "backbone.layer"), ("seed", "backbone.seed"),
     ("png.slect", "png.select"), ("endpoint", "storage.endpoint_url"), ("batchsize", "compute.batch_size"),
     ("png.batch_size", "compute.batch_size")],
)  # fmt: skip
def test_did_you_mean(key, suggestion):
    line = problems(HeatmapsConfig, "", [*HEATMAPS, f"{key}=1"])[0]
    assert line == f"{key}: unknown key; did you mean {suggestion}? (command line)"


def test_an_ambiguous_key_names_both():
    assert "did you mean backbone.seed or fit.seed?" in problems(TrainConfig, "", [*TRAIN, "seed=1"])[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["backbone.weights=random"],
            "backbone.seed: required with backbone.weights=random, for example backbone.seed=0 (command line)",
        ),
        (
            ["backbone.seed=4"],
            'backbone.seed: 4 goes only with backbone.weights=random, got "published"; set backbone.seed=null'
            " (command line)",
        ),
        (
            ["backbone.weights=random", "backbone.seed=0", f"backbone.sha256={'a' * 64}"],
            "backbone.sha256: random weights come from no file and have no digest; set backbone.sha256=null"
            " (command line)",
        ),
        (
            ["fit.validation_share=0.5", "fit.test_share=0.4"],
            "fit.validation_share: 0.5 and fit.test_share=0.4 leave too little to train on; their sum has"
            " to be below 0.9 (command line)",
        ),
        (
            ["storage.anonymous=true", "storage.profile=lab"],
            'storage.profile: "lab" has no effect with storage.anonymous=true; set one of the two (command line)',
        ),
        (
            ["ratings.score_column=image"],
            'ratings.score_column: "image" is ratings.image_column already (command line)',
        ),
    ],
)
def test_values_that_do_not_go_together(overrides, expected):
    assert problems(TrainConfig, "", [*TRAIN, *overrides]) == [expected]


def test_what_a_job_does_not_do_it_has_no_key_for():
    """Training and importance run in float32: a precision that is taken and ignored would be a lie."""
    importance = ["objective=prediction", "images=i", "head=h", "output=o"]
    for model, overrides, key in (
        (TrainConfig, TRAIN, "compute.precision=bfloat16"),
        (TrainConfig, TRAIN, "compute.compile=true"),
        (TrainConfig, TRAIN, "compute.chunk=8"),
        (ImportanceConfig, importance, "compute.precision=bfloat16"),
        (ImportanceConfig, importance, "compute.compile=true"),
    ):
        (line,) = problems(model, "", [*overrides, key])
        assert re.match(rf"{key.partition('=')[0]}: unknown key; .*\(command line\)", line)
    assert parse_config(ImportanceConfig, "", [*importance, "compute.chunk=8"]).compute.chunk == 8


def test_a_protocol_of_fewer_images_than_its_folds_need():
    validate = ["ratings.path=r.csv", "head=h", "output=o", "protocol_images=14"]
    assert problems(ValidateConfig, "", validate) == [
        "protocol_images: 14 are too few for folds=5; at least 15 (command line)"
    ]
    assert parse_config(ValidateConfig, "", [*validate, "folds=4"]).folds == 4


def test_a_conflict_names_both_origins():
    text = "backbone: {weights: random, seed: 1}"
    line = problems(TrainConfig, text, [*TRAIN, "backbone.weights=published"])[0]
    assert line.endswith("(job.yaml:1, command line)")


def test_overriding_the_backbone_of_a_head():
    alone = parse_config(HeatmapsConfig, "", [*HEATMAPS, "backbone.seed=1"])
    assert (alone.backbone.seed, alone.backbone.weights) == (1, None)
    assert "backbone.seed: required" in problems(HeatmapsConfig, "", [*HEATMAPS, "backbone.weights=random"])[0]


@pytest.mark.parametrize(
    ("text", "selection"),
    [("all", PngSelection("all")), ("none", PngSelection("none")), ("top:12", PngSelection("top", count=12)),
     ("bottom:1", PngSelection("bottom", count=1)), ("sample:0.25", PngSelection("sample", share=0.25)),
     ("sample:1", PngSelection("sample", share=1.0)), ("sample:1e-3", PngSelection("sample", share=0.001))],
)  # fmt: skip
def test_png_selection(text, selection):
    assert parse_config(HeatmapsConfig, "", [*HEATMAPS, f"png.select={text}"]).png.selection == selection


@pytest.mark.parametrize(
    "text",
    ["some", "ALL", "top", "top:0", "top:-1", "top:1.5", "top: 3", "bottom:x", "sample:0", "sample:1.01",
     "sample:nan", "sample:", "top:٣", "all\n"],
)  # fmt: skip
def test_impossible_png_selections(text):
    (line,) = problems(HeatmapsConfig, "", [*HEATMAPS, f"png.select={text}"])
    assert line.startswith("png.select: expected all, none, top:N or bottom:N (N a whole number >= 1), or sample:F")


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("run_id", ["a", "2026-11-23_v1.0", "x" * 100], ["", ".", "-a", "a/b", "x" * 101, "a b", "a\n", "é"]),
        ("storage.endpoint_url", ["http://localhost:9000", "https://s3.example.org"], ["localhost:9000"]),
        ("backbone.sha256", ["0a" * 32], ["0a" * 31, "0A" * 32, "0g" * 32]),
        ("max_error_share", ["0", "1", "0.5"], ["-0.1", "1.1", "5%"]),
        ("limits.max_pixels", ["1", "89478485"], ["0", "89478486"]),
        ("png.max_side", ["16", "8192"], ["15", "8193"]),
        ("compute.device", ["auto", "cpu", "cuda"], ["gpu", "CPU", "null"]),
        ("preprocessing.mode", ["letterbox", "null"], ["crop"]),
        ("storage.anonymous", ["true", "false"], ["yes", "1", "null"]),
    ],
)
def test_bounds(key, good, bad):
    for value in good:
        parse_config(HeatmapsConfig, "", [*HEATMAPS, f"{key}={value}"])
    for value in bad:
        (line,) = problems(HeatmapsConfig, "", [*HEATMAPS, f"{key}={value}"])
        assert line.startswith(f"{key}: ")


def test_duplicate_keys_name_key_and_lines():
    text = "fit:\n  seed: 1\n  seed: 2\npng: {kind: both}\npng:\n  kind: overlay\npng.kind: heatmap\n"
    assert problems(DemoConfig, text) == [
        "fit.seed: given twice, first at job.yaml:2 (job.yaml:3)",
        "png: given twice, first at job.yaml:4 (job.yaml:5)",
        "png.kind: given twice, first at job.yaml:4 (job.yaml:7)",
    ]


def test_an_empty_section_keeps_its_defaults():
    assert parse_config(DemoConfig, "# nothing set\nfit:\npng: {}\n") == DemoConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", 'job.yaml: expected a mapping of keys to values, got ["a", "b"]'),
        ("just words", 'job.yaml: expected a mapping of keys to values, got "just words"'),
        ("fit:\n  seed: [1", "job.yaml:2: not valid YAML: expected ',' or ']'"),
        ("output: &a x\nfit: *a", "job.yaml:2: not valid YAML: aliases (*) and tags (!) are not allowed"),
        ("output: !!python/name:os.system x", "job.yaml:1: not valid YAML: aliases (*) and tags (!)"),
        ("a: 1\n---\nb: 2", "job.yaml:2: not valid YAML"),
        ("output: \x07", "job.yaml: not valid YAML"),
        ("output: " + "[" * 5000, "job.yaml: not valid YAML"),
        ("[a]: 1", "job.yaml: a key has to be a word (job.yaml:1)"),
    ],
)
def test_files_that_are_no_configuration(text, message):
    (line, *_) = problems(DemoConfig, text)
    assert line.startswith(message)


def test_unreadable_files(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("output: Zoë".encode("latin-1"))
    for path, reason in [
        (latin, "as UTF-8 text"),
        (tmp_path / "absent.yaml", "No such file"),
        (tmp_path, "Is a directory"),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(DemoConfig, ["--config", str(path)], doc="")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dry"], "--dry: unknown flag; the flags are --config FILE, --dry-run, --help [NAME] and --help-all"),
        (["--output=x"], "--output=x: unknown flag; write output=x; the flags are"),
        (["-v"], "-v: unknown flag"),
        (["--config"], "--config: expected the path of a YAML file after it, got nothing"),
        (["--config", "a", "--config", "b"], '--config: expected one file, got "a", "b"'),
    ],
)
def test_flags(argv, message):
    with pytest.raises(ConfigError) as caught:
        load_config(DemoConfig, argv, doc="")
    assert str(caught.value).splitlines()[1].startswith(message)


JOBS = {
    path.stem: importlib.import_module(f"jobs.{path.stem}")
    for path in sorted((CONFIGS.parent / "jobs").glob("*.py"))
    if path.stem != "__init__"
}


def config_of(job):
    """The configuration that a job reads."""
    return next(
        value
        for name, value in vars(job).items()
        if name.endswith("Config") and f"load_config({name}," in inspect.getsource(job.main)
    )


def help_of(model, argv, capsys):
    """What a command line prints and exits with 0."""
    with pytest.raises(SystemExit) as caught:
        load_config(model, argv, doc="\nWhat the job does.\n")
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("job", JOBS)
def test_help_fits_a_screen_and_leads_with_an_example_that_works(job, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py"])
    with pytest.raises(SystemExit) as caught:
        JOBS[job].main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith(f"Example:  python jobs/{job}.py ")
    example = shlex.split(text[: text.index("Usage:")].replace("\\\n", " "))[3:]
    model = config_of(JOBS[job])
    parse_config(model, "", example)
    for name, key in keys_of(model).items():
        section = name.rpartition(".")[0]
        assert re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE) or (
            not key.is_required and re.search(rf"\b{section}\.\*", text)
        ), name


@pytest.mark.parametrize("model", [HeatmapsConfig, TrainConfig, DemoConfig])
def test_help_all_lists_every_key(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/job.py"])
    lines = help_of(model, ["nonsense", "--help-all"], capsys).splitlines()
    assert lines[0].startswith("Example:  python jobs/job.py")
    assert max(map(len, lines)) <= 110

    names = []
    for name, field in model.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        names += [f"{name}.{leaf}" for leaf in section] if section else [name]
    documented = [line.split()[0] for line in lines if re.match(r"  [a-z][\w.]* \(", line)]
    assert sorted(documented) == sorted(names)


def test_help_shows_types_defaults_and_what_is_required(capsys):
    text = help_of(TrainConfig, ["--help-all"], capsys)
    assert "  output (text): REQUIRED\n      Where the head bundle goes." in text
    assert '  compute.device (one of auto, cpu, cuda): "auto"' in text
    assert "  fit.workers (whole number >= 1 or null): null" in text
    assert "fit: Fitting the head.\n" in text


def test_help_about_one_section_or_key(capsys):
    everything = help_of(TrainConfig, ["--help-all"], capsys)
    for argv in (["--help", "fit"], ["--help=fit"], ["-h", "fit", "output=x"], ["--help", "fit.*"]):
        text = help_of(TrainConfig, argv, capsys)
        assert text.startswith("fit: Fitting the head.\n  fit.epochs (whole number >= 1): 300\n")
        assert text.strip() in everything
    assert help_of(TrainConfig, ["--help", "output"], capsys) == (
        "  output (text): REQUIRED\n      Where the head bundle goes.\n"
    )
    for argv in (["-h"], ["--help", "output=x"], ["--help", "--dry-run"], ["output=x", "--help"]):
        assert help_of(TrainConfig, argv, capsys).startswith("Example:")
    with pytest.raises(ConfigError, match=r"--help fitt.seed: no key and no section; did you mean fit.seed?"):
        load_config(TrainConfig, ["--help", "fitt.seed"], doc="")


def test_the_environment_changes_nothing(monkeypatch):
    for name in ["OUTPUT", "output", "FIT__SEED", "fit.seed", "AIS_OUTPUT", "FIT_SEED"]:
        monkeypatch.setenv(name, "7")
    assert parse_config(DemoConfig, "output: $HOME/x") == DemoConfig(output="$HOME/x")


def test_yaml_round_trip():
    config = parse_config(
        HeatmapsConfig,
        "",
        [
            "images=/a b/ü#?: *.jpg",
            "output=null ",
            "head=~",
            "run_id=1e-3",
            "importance=true",
            "max_error_share=1e-7",
        ],
    )
    assert config.max_error_share == 1e-7
    assert parse_config(HeatmapsConfig, to_yaml(config)) == config


def test_fingerprint():
    config = DemoConfig()
    assert config_fingerprint({"b": 1, "a": None}) == hashlib.sha256(b'{"a":null,"b":1}').hexdigest()
    assert config_fingerprint(config) == config_fingerprint(config.model_dump())
    assert config_fingerprint(parse_config(DemoConfig, to_yaml(config))) == config_fingerprint(config)
    assert config_fingerprint(DemoConfig(output="x")) != config_fingerprint(config)


@pytest.mark.parametrize(
    ("outcome", "code", "printed"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (ConfigError("fit.seed: wrong"), 2, "error: fit.seed: wrong\n"),
        (HeadError("'nohead' is no head bundle"), 2, "error: 'nohead' is no head bundle\n"),
        (RatingsError("all ratings are 1"), 2, "error: all ratings are 1\n"),
        (WeightsError("'a.pth' is not a file"), 2, "error: 'a.pth' is not a file\n"),
        (SimilarityError("the matrix is not square"), 2, "error: the matrix is not square\n"),
        (ImportanceError("'out' is of another head"), 2, "error: 'out' is of another head\n"),
        (StorageError("'s3://b' cannot be read"), 1, "error: 's3://b' cannot be read\n"),
        (RunError("an image is missing"), 1, "error: an image is missing\n"),
        (LeaseLostError("taken over"), 3, "error: taken over\n"),
        (
            LockedError("/run/lock", "process 7 on a", {}, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
            3,
            "error: '/run/lock' is held by process 7 on a: it is writing there. Wait for it, or end it; if it is dead, "
            "its lock expires at 2026-01-02 03:04:05 UTC\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (TerminatedInterrupt(), 143, "told to end\n"),
    ],
)
def test_exit_codes(outcome, code, printed, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job.py", "a=1"])

    def main(argv):
        assert argv == ["a=1"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run_job(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == printed


def test_a_terminal_that_is_not_utf8():
    code = "from ais.command_line import run_job; run_job(lambda argv: print('2048 → 1'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"2048 \\u2192 1\n"


def test_a_working_directory_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as caught:
        run_job(lambda _argv: pytest.fail("it was started"))
    assert caught.value.code == 2
    assert "the working directory was deleted; change to one that is there" in capsys.readouterr().err


def test_a_reader_that_has_gone():
    """As of ``| head -1``: quiet, and no success."""
    code = "from ais.command_line import run_job; run_job(lambda argv: [print(number) for number in range(100_000)])"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.readline()
    job.stdout.close()
    assert (job.stderr.read(), job.wait(60)) == (b"", 128 + signal.SIGPIPE)


def test_a_broken_pipe_elsewhere_is_no_reader_that_has_gone():
    def main(_argv):
        raise BrokenPipeError("of a server")

    with pytest.raises(BrokenPipeError, match="of a server"):
        run_job(main)


def test_an_address_that_is_not_utf8():
    with pytest.raises(ConfigError, match=r"images=.*: not UTF-8 text; rename the file or folder"):
        load_config(HeatmapsConfig, [os.fsdecode(b"images=caf\xe9"), "output=o", "head=h"], doc="")


def test_told_to_end_where_somebody_makes_another_interrupt_of_it(capsys, monkeypatch):
    """As `ray.get` does."""
    monkeypatch.setattr(sys, "argv", ["job.py"])

    def main(_argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        except TerminatedInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(SystemExit) as caught:
        run_job(main)
    assert (caught.value.code, capsys.readouterr().err) == (143, "told to end\n")


def test_an_unexpected_error_keeps_its_traceback():
    def main(_argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(main)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path):
    job = path.stem.replace("-", "_")
    model = config_of(JOBS[job])
    config = load_config(model, ["--config", str(path)], doc="").config
    assert config.output.startswith("s3://") or "demo" in job
    assert parse_config(model, to_yaml(config)) == config
    assert f"jobs/{job}.py" in path.read_text()


def test_import_is_light():
    heavy = "sorted({'torch', 'ray', 'numpy', 'fsspec', 'pyarrow'} & set(sys.modules))"
    code = f"import sys, ais.command_line; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
