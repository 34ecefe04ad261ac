"""The files that describe clusters, checked without any: cloud configurations, Kubernetes manifests, image, dashboard.

Ray's own validators and KubeRay's schemas, and what they miss. Nothing is started.
"""

import copy
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from ais import config as configs
from ais.backbones import load_backbone
from ais.heads import HeadEnsemble, RegressionHead, save_head
from ais.pipeline.cluster import MAX_CPUS_LABEL, MAX_GPUS_LABEL
from ais.pipeline.metrics import metrics
from ais.settings import parse_config
from cluster import submit
from cluster.kuberay.validate import pod_problems, problems
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
CLOUDS = ("aws", "gcp")
MANIFESTS = sorted(path.name for path in (FOLDER / "kuberay").glob("*.yaml"))
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def cloud(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def manifest(name: str) -> dict[str, Any]:
    [found] = yaml.safe_load_all((FOLDER / "kuberay" / name).read_text())
    return found


def grown(types: Iterator[dict[str, Any]]) -> dict[str, str]:
    """The labels that a head with these worker types should carry."""
    types = list(types)
    cpus, gpus = (sum(kind["max_workers"] * kind["resources"].get(key, 0) for kind in types) for key in ("CPU", "GPU"))
    return {MAX_CPUS_LABEL: str(int(cpus)), MAX_GPUS_LABEL: str(int(gpus))}


@pytest.mark.parametrize("name", CLOUDS)
class TestCloud:
    def test_ray_accepts_it(self, name: str) -> None:
        validate_config(prepare_config(copy.deepcopy(cloud(name))))

    def test_head_on_demand_without_cpus_and_workers_on_spot_from_none(self, name: str) -> None:
        found = cloud(name)
        types = dict(found["available_node_types"])
        head = types.pop(found["head_node_type"])
        assert head["resources"] == {"CPU": 0}
        assert "spot" not in json.dumps(head).lower()
        assert "--num-cpus=0" in found["head_start_ray_commands"][-1]
        assert sum(kind["max_workers"] for kind in types.values()) == found["max_workers"]
        for kind in types.values():
            assert 0 == kind["min_workers"] < kind["max_workers"]
            assert "spot" in json.dumps(kind["node_config"]).lower()
        assert [kind for kind in types.values() if "GPU" in kind["resources"]]
        assert [kind for kind in types.values() if "GPU" not in kind["resources"]]

    def test_the_head_says_how_far_the_cluster_grows(self, name: str) -> None:
        found = cloud(name)
        command = found["head_start_ray_commands"][-1]
        labels = dict(pair.split("=") for pair in re.search(r"--labels=(\S+)", command)[1].split(","))
        assert labels == grown(kind for key, kind in found["available_node_types"].items() if key != "head")

    def test_nothing_secret_and_nothing_open(self, name: str) -> None:
        found = cloud(name)
        text = (FOLDER / f"{name}.yaml").read_text()
        # Machines are known by their role.
        roles = [kind["node_config"] for kind in found["available_node_types"].values()]
        assert all("IamInstanceProfile" in role or "serviceAccounts" in role for role in roles)
        assert not re.search(
            r"(?i)secret|password(?!-stdin)|access_key|private_key", text.replace("get-login-password", "")
        )
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert "RAY_AUTH_MODE=token" in found[commands][-1]
        assert "--dashboard-host=127.0.0.1" in found["head_start_ray_commands"][-1]
        assert "auth_token" in json.dumps(found["file_mounts"])

    def test_image_with_a_version_and_no_nightly(self, name: str) -> None:
        found = cloud(name)
        assert re.search(r":\d+\.\d+\.\d+$", found["docker"]["image"])
        assert found["setup_commands"] == []
        assert "nightly" not in json.dumps(prepare_config(copy.deepcopy(found))["setup_commands"])


class TestKubernetes:
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_fits_the_schema(self, name: str) -> None:
        found = manifest(name)
        if found["apiVersion"].startswith("ray.io/"):
            assert problems(found) == []
        else:
            assert problems(found) is None
            assert found["kind"] in ("ServiceAccount", "CronJob", "PodMonitor")

    def test_the_checker_sees_typos_wrong_types_and_what_is_missing(self) -> None:
        wrong = manifest("raycluster.yaml")
        wrong["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
        wrong["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
        del wrong["spec"]["workerGroupSpecs"][1]["template"]
        wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
        found = "\n".join(problems(wrong) or [])
        for part in ("'maxReplica' was unexpected", "0 is not of type 'string'", "'template' is a required", "'imag'"):
            assert part in found

    def test_ray_derives_from_it_what_we_mean(self) -> None:
        found = manifest("raycluster.yaml")
        found["metadata"]["namespace"] = "default"
        derived = _derive_autoscaling_config_from_ray_cr(found)
        types = dict(derived["available_node_types"])
        head = types.pop(derived["head_node_type"])
        assert head["resources"]["CPU"] == 0
        assert head["labels"] == grown(types.values())
        assert all(kind["min_workers"] == 0 and kind["idle_timeout_s"] == 120 for kind in types.values())
        assert found["spec"]["autoscalerOptions"]["version"] == "v2"  # without it idleTimeoutSeconds has no effect
        assert found["spec"]["rayVersion"] == PINNED["ray"]
        assert found["spec"]["authOptions"] == {"mode": "token"}

    def test_pods_are_known_by_their_account_and_run_as_nobody_special(self) -> None:
        cluster = manifest("raycluster.yaml")["spec"]
        cron = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
        assert pod_problems(cron) == []
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        pods = [*(group["template"]["spec"] for group in groups), cron["spec"]]
        account = manifest("access.yaml")
        for pod in pods:
            assert pod["serviceAccountName"] == account["metadata"]["name"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            [container] = pod["containers"]
            assert re.search(r":\d+\.\d+\.\d+$", container["image"])
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert not [
                variable for variable in container.get("env", []) if "TOKEN" in variable["name"] and "value" in variable
            ]
        gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")["template"]["spec"]
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
        assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"

    def test_the_jobs_name_the_cluster_that_there_is(self) -> None:
        cluster = manifest("raycluster.yaml")
        name = cluster["metadata"]["name"]
        assert manifest("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster["spec"]
        assert manifest("raycronjob.yaml")["spec"]["jobTemplate"]["clusterSelector"] == {"ray.io/cluster": name}
        [container] = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{name}-head-svc:8265"
        assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}

    def test_ticks_do_not_overlap_and_a_lost_pod_follows_the_job(self) -> None:
        spec = manifest("cronjob.yaml")["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        job = spec["jobTemplate"]["spec"]
        [container] = job["template"]["spec"]["containers"]
        # The job's name is the same for all of its pods; a pod's own is not.
        [tick] = [variable for variable in container["env"] if variable["name"] == "TICK"]
        assert tick["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
        assert container["command"] == ["python", "cluster/submit.py", "--tick", "$(TICK)", "--"]
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
        rule = job["podFailurePolicy"]["rules"][-1]
        assert rule["onExitCodes"]["values"] == [0, submit.GAVE_UP]
        assert rule["onExitCodes"]["containerName"] == container["name"]

    def test_prometheus_finds_the_port_that_the_pods_have(self) -> None:
        monitor = manifest("podmonitor.yaml")["spec"]
        cluster = manifest("raycluster.yaml")["spec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            labels = group["template"]["metadata"]["labels"]
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
            ports = {
                port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]
            }
            assert (
                str(ports[monitor["podMetricsEndpoints"][0]["port"]]) == group["rayStartParams"]["metrics-export-port"]
            )


def test_the_image_is_pinned_and_holds_no_weights() -> None:
    lines = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", lines, re.MULTILINE) == [f"rayproject/ray:{PINNED['ray']}-py311-cpu"]
    assert re.findall(r"^USER (\S+)", lines, re.MULTILINE) == ["ray"]
    assert "--constraint constraints.txt" in lines
    copied = {word for line in re.findall(r"^COPY .*$", lines, re.MULTILINE) for word in line.split()[2:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def commands() -> list[str]:
    """Every command of ours in the files of `cluster/`, the README and docs/scaling-out.md, with its lines joined."""
    found = []
    for path in [
        *FOLDER.glob("*.yaml"),
        *FOLDER.glob("kuberay/*.yaml"),
        ROOT / "README.md",
        ROOT / "docs" / "scaling-out.md",
    ]:
        text = re.sub(r"\\\n[#\s]*", "", path.read_text())
        found += re.findall(r"python (?:jobs|cluster)/\w+\.py[^\n`#&|]*", text)
    cron = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    found.append(shlex.join([*cron["command"], *cron["args"]]))
    return sorted({command.strip().rstrip(".,:;)") for command in found})


MODELS = {
    "heatmaps": configs.HeatmapsConfig,
    "train": configs.TrainConfig,
    "validate": configs.ValidateConfig,
    "importance": configs.ImportanceConfig,
    "compare": configs.CompareConfig,
    "demo": configs.DemoConfig,
    "score": configs.ScoreConfig,
}


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_there_is(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    assert Path(words[0]).is_file()
    if words[0] == "cluster/submit.py":
        assert submit.main(["--dry-run", *words[1:]]) == 0
        assert f"command     {shlex.join(words[words.index('--') + 1 :])}" in capsys.readouterr().out
        words = words[words.index("--") + 2 :]
    if words[0].startswith("jobs/"):
        overrides = [word for word in words[1:] if "=" in word and not word.startswith("--")]
        file = submit.config_of(words)
        model = MODELS.get(Path(words[0]).stem)
        if model is not None:
            parse_config(model, file.read_text() if file else "", overrides)


@pytest.mark.parametrize("command", [command for command in commands() if "--config configs/" in command])
def test_the_job_that_is_submitted_would_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its own ``--dry-run``, with addresses on this machine in place of the buckets, and a small head."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    job = importlib.import_module(f"jobs.{Path(next(word for word in words if word.startswith('jobs/'))).stem}")
    heads = HeadEnsemble([RegressionHead(TINY.embedding_size, hidden=4)])
    save_head(str(tmp_path / "head"), heads, load_backbone(TINY, weights="random", seed=3), "center_crop", {})
    (tmp_path / "photos").mkdir()
    here = [f"{key}={tmp_path / folder}" for key, folder in (("images", "photos"), ("output", "out"), ("head", "head"))]
    assert job.main(["--config", str(submit.config_of(words)), "--dry-run", *here]) == 0
    assert "tiny" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_same_tick_is_the_same_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "job.yaml"
    file.write_text("images: a\n")
    command = ["python", "jobs/heatmaps.py", "--config", str(file)]
    name = submit.submission_id(command, "2026-11-25")
    assert re.fullmatch(r"heatmaps-2026-11-25-[0-9a-f]{12}", name)
    assert submit.submission_id(command, "2026-11-25") == name
    assert submit.submission_id(command, "2026-11-26") != name
    assert submit.submission_id([*command, "run_id=x"], "2026-11-25") != name
    file.write_text("images: b\n")
    assert submit.submission_id(command, "2026-11-25") != name
    with pytest.raises(ValueError, match="no file of a job"):
        submit.submission_id(["python", "jobs/heatmap.py"], "1")
    with pytest.raises(ValueError, match="no such file"):
        submit.submission_id(["python", "jobs/heatmaps.py", "--config=x.yaml"], "1")


def exported() -> set[str]:
    """Names that Prometheus gets of our metrics; its exporter adds the suffixes."""
    suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
    found = vars(metrics()).values()
    return {f"ray_{metric.info['name']}{suffix}" for metric in found for suffix in suffixes[type(metric).__name__]}


def test_the_dashboard_shows_every_metric_and_only_those_that_there_are() -> None:
    import ray.dashboard.modules.metrics.dashboards as theirs

    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions.append(dashboard["templating"]["list"][1]["query"]["query"])
    shown = {name for text in expressions for name in re.findall(r"\b(?:ray|autoscaler)_\w+", text)}
    rays = "".join(path.read_text() for path in Path(theirs.__file__).parent.glob("*_panels.py"))
    assert {name for name in shown if name.startswith("ray_ais_")} <= exported()
    assert all(name in rays for name in shown if not name.startswith("ray_ais_"))
    bases = {re.sub("_(total|bucket|sum|count)$", "", name) for name in shown}
    assert {f"ray_{metric.info['name']}" for metric in vars(metrics()).values()} <= bases
    # Panels that do not lie over one another, each with a title and what it means.
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
