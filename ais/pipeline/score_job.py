"""Scheduled scoring: a tick lists the collection, scores what is new or changed, and replaces the latest scores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ais.backbones import BackboneSpec
from ais.config import ScoreConfig, config_fingerprint
from ais.errors import RunError
from ais.images import Limits
from ais.lease import Lease
from ais.listing import list_images
from ais.pipeline.cluster import start_ray
from ais.pipeline.finish import print_summary, summarise
from ais.pipeline.heatmaps import Work, run_heatmaps
from ais.pipeline.prepare import Prepared, prepare_heatmaps
from ais.runs import FLEETING
from ais.scoring.collection import (
    ANY_REASON,
    DRAFT_SCHEMA,
    PRESENT,
    SNAPSHOT_SCHEMA,
    Census,
    Changes,
    ListingDigest,
    Outcomes,
    completed,
    draft,
    images_to_score,
    listing_tables,
)
from ais.scoring.drift import Drift, Shares, Thresholds, compare, quantiles, sorted_scores
from ais.scoring.files import read_kept, read_tables, upload, write_tables
from ais.scoring.series import Series, Snapshot, State, duration, prune_all, tick_of
from ais.scoring.sorting import first_of_each, sort_by_uri
from ais.settings import to_yaml
from ais.storage import absolute, check_keys, read_json, scratch_folder

LOOK_AT_ME = 4


@dataclass(frozen=True)
class Scoring:
    """A scoring job that can start.

    Args:
        config: with every default resolved and local paths absolute.
        model: what a tick scores with; every tick puts its own run folder in.
        series: of this model and collection.
    """

    config: ScoreConfig
    model: Prepared
    series: Series

    def describe(self) -> str:
        """Say in a few lines what would be done."""
        lines = self.model.describe().splitlines()[:-1]  # without the run, which the tick decides
        return "\n".join([*lines, f"series      {self.series.folder.address}"])

    def under(self, lease: Lease) -> Scoring:
        """The same, written only while the lease lasts."""
        return replace(self, series=self.series.under(lease.fence))

    def at(self, tick: str) -> Prepared:
        """The job of one tick."""
        metadata = self.model.plan.metadata | {"ais.run_id": tick, "ais.series": self.series.name}
        return replace(self.model, run=self.series.run(tick), plan=replace(self.model.plan, metadata=metadata))


def prepare_scoring(config: ScoreConfig, spec: BackboneSpec | None = None) -> Scoring:
    """Check everything that scoring needs, without listing or reading an image.

    Args:
        config: as configured.
        spec: a backbone's record to use instead of the registry's.

    Raises:
        AisError: as `prepare_heatmaps`.
    """
    model = prepare_heatmaps(config.as_heatmaps(), spec, heatmaps=config.heatmaps)
    resolved = {
        key: getattr(model.config, key) for key in ("images", "head", "importance", "backbone", "preprocessing")
    }
    config = config.model_copy(update={**resolved, "output": absolute(config.output)})
    # Other bounds are no reason to score everything again, only what failed; other pixels are.
    identity = {key: value for key, value in model.identity.items() if key != "limits"}
    identity["scaled_jpeg"] = config.limits.scaled_jpeg
    name = f"{model.plan.source.spec.name}-{config_fingerprint(identity)[:12]}"
    return Scoring(config, model, Series(model.plan.storage.open(config.output), name))


def run_ticks(scoring: Scoring) -> int:
    """Do this tick, after a run of the series that was interrupted, if there is one; return the exit code.

    Args:
        scoring: the job, under the lock of OUTPUT.

    Raises:
        AisError: the collection cannot be listed or is empty, or the work stopped; the same command continues.
    """
    state = scoring.series.state()
    name = scoring.config.tick or state.open or tick_of(datetime.now(UTC))
    if state.open is not None and state.open != name:
        print(f"unfinished  {state.open} was interrupted, and is finished first", flush=True)
        Tick(scoring, state.open, state).run()
        state = scoring.series.state()
    return Tick(scoring, name, state).run()


class Tick:
    """One run of a series: what has to be done, and the end of it.

    Args:
        scoring: the job.
        name: of the run.
        state: of the series.
    """

    def __init__(self, scoring: Scoring, name: str, state: State) -> None:
        self._config = scoring.config
        self._series = scoring.series
        self._prepared = scoring.at(name)
        self._run = self._prepared.run
        self._name = name
        self._state = state
        self._draft = self._run.folder / "draft.parquet"
        self._snapshot = self._run.folder / "snapshot.parquet"
        self._listing: dict[str, Any] = {}
        self._limits = scoring.config.limits.model_dump()

    def run(self) -> int:
        """Set out, score, account; return the exit code. A complete tick does nothing."""
        started = time.monotonic()
        print(f"tick        {self._name}", flush=True)
        if (summary := self._run.summary()) is not None:
            self._check_version("summary.json", summary, ("finished_at", "alarms", "exit_code", "snapshot"))
            return self._report_complete(summary)
        record = self._run.record()
        if record is not None:
            self._check_version("run.json", record, ("identity", "listing", "changes", "before", "ignored"))
            self._go_on_under(record["identity"]["limits"])
            print(f"continues   {_said(record['listing'], record['changes'])}", flush=True)
        else:
            record = self._set_out()
        if record is None:
            return self._finish_unchanged()
        return self._finish(record, self._score(record["images"]), started)

    def _check_version(self, name: str, document: dict[str, Any], needed: Sequence[str]) -> None:
        """Refuse to go on with what another version of this package began.

        Raises:
            RunError: the document lacks a key.
        """
        way_out = "give another tick, or finish or delete the run with the version that began it"
        check_keys(self._run.folder / name, document, needed, way_out)

    def _go_on_under(self, limits: dict[str, Any]) -> None:
        """Finish a run under the limits that its first errors were found under: others are for the next night."""
        plan, identity = self._prepared.plan, self._prepared.identity
        self._limits = limits
        self._prepared = replace(
            self._prepared, plan=replace(plan, limits=Limits(**limits)), identity={**identity, "limits": limits}
        )

    def _set_out(self) -> dict[str, Any] | None:
        """List the collection and write down what has to be done; ``None`` if nothing has."""
        now = datetime.now(UTC).replace(microsecond=0)
        changes = Changes()
        with scratch_folder("ais-score-") as scratch:
            digest = ListingDigest()
            listing = list_images(self._config.images, self._prepared.plan.storage)
            tables = sort_by_uri(listing_tables(listing, digest), scratch)
            if digest.images == 0:
                raise RunError(
                    "there are no images; nothing is marked as gone, and the latest scores stay as they are; "
                    "check the address"
                )
            self._listing = {"images": digest.images, "digest": str(digest), "ignored": dict(listing.ignored)}
            known, retry = self._state.snapshot, self._retry()
            if known is not None and known.digest == self._listing["digest"] and retry is None:
                return None
            rows = draft(
                self._known(scratch),
                first_of_each(tables, changes.repeat),
                changes,
                now=now,
                retry=retry,
                forget_before=now - duration(self._config.keep) if self._config.keep else None,
            )
            drafted = scratch / "draft.parquet"
            write_tables(drafted, rows, DRAFT_SCHEMA)
            if not changes.any:
                return None
            print(f"listing     {_said(self._listing, changes.as_dict())}", flush=True)
            self._state = replace(self._state, open=self._name)
            self._series.write_state(self._state)
            upload(drafted, self._draft)
            facts = {
                **self._prepared.facts(),
                "listed_at": now.isoformat(),
                "series": self._series.name,
                "ignored": self._listing["ignored"],
                "listing": self._listing,
                "changes": changes.as_dict(),
                "before": self._before(),
            }
            if changes.to_score:
                self._run.set_out(images_to_score(read_tables(drafted)), to_yaml(self._config), facts)
            else:  # a run without a manifest
                (self._run.folder / "config.yaml").write_text(to_yaml(self._config))
                record = {"images": 0, **facts}
                (self._run.folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        return self._run.record()

    def _retry(self) -> str | None:
        """Which failed images are worth another try, if there are any."""
        known = self._state.snapshot
        if known is None or not self._config.retry_errors:
            return None
        if known.failed and known.limits != self._limits:
            return ANY_REASON
        return FLEETING if known.retryable else None

    def _limits_now(self) -> dict[str, Any]:
        """The limits under which the failed images of the snapshot failed."""
        known = self._state.snapshot
        return self._limits if known is None or self._config.retry_errors else known.limits

    def _known(self, scratch: Path) -> Iterator[pa.Table]:
        if self._state.snapshot is None:
            return iter([SNAPSHOT_SCHEMA.empty_table()])
        return read_kept(self._series.output / self._state.snapshot.path, scratch)

    def _before(self) -> dict[str, Any] | None:
        """The collection that scores are compared with: as this series left it, or else as readers see it."""
        known = self._state.snapshot
        if known is not None:
            return {"series": self._series.name, "run_id": known.run_id, "snapshot": known.path}
        keys = ("series", "run_id", "snapshot")
        latest = read_json(self._series.output / "latest.json", keys)
        return latest and {key: latest[key] for key in keys}

    def _score(self, images: int) -> Work:
        if images == 0:
            return Work(0, 0.0, {})
        start_ray()
        return run_heatmaps(self._run, self._prepared.plan, images)

    def _finish(self, record: dict[str, Any], work: Work, started: float) -> int:
        """Account for every image, write the snapshot and the drift report, publish, and close the books."""
        now = datetime.now(UTC)
        # Not now, so that a snapshot that has to be written again after a kill is the same to the last bit.
        listed_at = datetime.fromisoformat(record["listed_at"])
        summary = self._summarise(record, work, time.monotonic() - started)
        outcomes = Outcomes.of(self._run, record["images"]) if record["images"] else Outcomes.none()
        census = Census()
        with scratch_folder("ais-score-") as scratch:
            rows = completed(read_kept(self._draft, scratch), outcomes, self._name, listed_at, census)
            schema = SNAPSHOT_SCHEMA.with_metadata(self._prepared.plan.metadata)
            write_tables(scratch / "snapshot.parquet", rows, schema)
            drift = self._drift(record, census, scratch)
            self._series.check_lock()
            upload(scratch / "snapshot.parquet", self._snapshot)
        snapshot = Snapshot(
            run_id=self._name,
            path=self._series.relative(self._snapshot),
            digest=record["listing"]["digest"],
            present=census.present,
            failed=census.failed,
            gone=census.gone,
            retryable=census.retryable,
            runs=tuple(sorted(census.runs)),
            limits=self._limits_now(),
            finished_at=now.isoformat(timespec="seconds"),
        )
        (self._run.folder / "drift.json").write_text(json.dumps(drift, indent=2) + "\n")
        sound = self._publish_if_sound(snapshot, now)
        code = (LOOK_AT_ME if drift["alarms"] else 0) if sound else 1
        summary |= {
            "finished_at": snapshot.finished_at,
            "listing": record["listing"],
            "changes": record["changes"],
            "snapshot": asdict(snapshot),
            "alarms": drift["alarms"],
            "exit_code": code,
        }
        self._run.finish(summary)
        self._close(State(snapshot, None, self._name))
        if record["images"]:
            print_summary(summary)
        _print_drift(drift)
        self._print_latest(snapshot, sound)
        for alarm in drift["alarms"]:
            print(f"LOOK        {alarm}", flush=True)
        return code

    def _finish_unchanged(self) -> int:
        now = datetime.now(UTC)
        snapshot = self._state.snapshot
        assert snapshot is not None, "an empty collection is refused, and any other is a change"
        print(f"unchanged   {self._listing['images']:,} images, as of {snapshot.run_id}; nothing to do", flush=True)
        # The digest may be another where the same images were listed otherwise: one of them twice.
        snapshot = replace(snapshot, digest=self._listing["digest"], limits=self._limits_now())
        sound = self._publish_if_sound(snapshot, now)
        code = 0 if sound else 1
        summary = {
            "run_id": self._name,
            "series": self._series.name,
            "finished_at": now.isoformat(timespec="seconds"),
            "unchanged": True,
            "listing": self._listing,
            "snapshot": asdict(snapshot),
            "alarms": [],
            "exit_code": code,
        }
        self._run.finish(summary)
        self._close(State(snapshot, None, self._name))
        self._print_latest(snapshot, sound)
        return code

    def _report_complete(self, summary: dict[str, Any]) -> int:
        if self._state.open == self._name:  # killed between its summary and the state of the series
            self._close(State(Snapshot.of(summary["snapshot"]), None, self._name))
        print(
            f"complete    finished {summary['finished_at']}; nothing to do (another tick lists the collection again)",
            flush=True,
        )
        for alarm in summary["alarms"]:
            print(f"LOOK        {alarm}", flush=True)
        return int(summary["exit_code"])

    def _publish_if_sound(self, snapshot: Snapshot, now: datetime) -> bool:
        if snapshot.error_share > self._config.max_error_share:
            return False
        self._series.publish(snapshot, now)
        return True

    def _close(self, state: State) -> None:
        """The end of a run: the series moves on, and what is too old goes."""
        if self._state.open == self._name and self._draft.exists():
            self._draft.remove()
        self._series.write_state(state)
        if self._config.keep:
            for name in prune_all(self._series.output, datetime.now(UTC) - duration(self._config.keep)):
                print(f"pruned      {name}, older than {self._config.keep}", flush=True)

    def _summarise(self, record: dict[str, Any], work: Work, wall_s: float) -> dict[str, Any]:
        if record["images"]:
            return {**summarise(self._prepared, record, work, wall_s), "series": self._series.name}
        return {**self._prepared.facts(), "series": self._series.name, "images": 0, "scored": 0, "failed": 0}

    def _drift(self, record: dict[str, Any], census: Census, scratch: Path) -> dict[str, Any]:
        before, changes = record["before"], record["changes"]
        pieces: list[np.ndarray] = []
        listed_before = failed_before = 0
        if before is not None:
            for table in read_kept(self._series.output / before["snapshot"], scratch, ["status", "score"]):
                present = pc.equal(table["status"], PRESENT)
                pieces.append(table.filter(present)["score"].to_numpy())
                counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["status"]).to_pylist()}
                failed_before += counts.get("failed", 0)
                listed_before += table.num_rows - counts.get("gone", 0)
        reference, collection = sorted_scores(pieces), sorted_scores(census.scores)
        first = before is None or before["series"] != self._series.name
        new = collection if first else sorted_scores(census.new_scores)
        drift = Drift(
            new=None if first else compare(reference, new),
            collection=compare(reference, collection),
            errors=Shares(census.new_failed, changes["new"] + changes["changed"]),
            gone=Shares(changes["gone"], 0 if first else listed_before),
        )
        thresholds = Thresholds(**self._config.drift.model_dump())
        return {
            "run_id": self._name,
            "series": self._series.name,
            "before": before,
            "changes": changes,
            "errors": {
                "new": drift.errors.as_dict(),
                "collection": Shares(census.failed, census.present + census.failed).as_dict(),
                "before": Shares(failed_before, listed_before).as_dict(),
            },
            "gone": drift.gone.as_dict(),
            "quantiles": {"before": quantiles(reference), "collection": quantiles(collection), "new": quantiles(new)},
            "new_against_before": drift.new and drift.new.as_dict(),
            "collection_against_before": drift.collection and drift.collection.as_dict(),
            "thresholds": asdict(thresholds),
            "alarms": drift.alarms(thresholds),
        }

    def _print_latest(self, snapshot: Snapshot, sound: bool) -> None:
        if not sound:
            print(
                f"failed      {snapshot.error_share:.1%} of the images could not be used, more than max_error_share="
                f"{self._config.max_error_share:g}; {self._series.output.address}/latest.parquet stays as it was, and "
                "everything good is kept in the series",
                flush=True,
            )
            return
        counts = f"{snapshot.present:,} images with a score"
        counts += f", {snapshot.failed:,} failed" if snapshot.failed else ""
        counts += f", {snapshot.gone:,} gone" if snapshot.gone else ""
        print(f"latest      {self._series.output.address}/latest.parquet: {counts}", flush=True)


def _said(listing: dict[str, Any], changes: dict[str, int]) -> str:
    texts = {
        "new": "new",
        "changed": "changed",
        "retried": "to try again",
        "returned": "back",
        "gone": "gone",
        "repeated": "listed more than once",
    }
    parts = [f"{changes[key]:,} {text}" for key, text in texts.items() if changes[key]]
    ignored = sum(listing["ignored"].values())
    parts += [f"{ignored:,} other files left out"] if ignored else []
    return f"{listing['images']:,} images: {', '.join(parts)}"


def _print_drift(drift: dict[str, Any]) -> None:
    before = drift["before"]
    if before is None:
        return
    names = {"new_against_before": "new images", "collection_against_before": "collection"}
    medians = {key: found and found["0.5"] for key, found in drift["quantiles"].items()}
    label = "drift       "
    for key, name in names.items():
        found = drift[key]
        if found is None:
            continue
        median = medians["new" if key == "new_against_before" else "collection"]
        print(
            f"{label}{name:<10}  median {medians['before']:.4g} → {median:.4g}, PSI {found['psi']:.3g} "
            f"(by chance {found['psi_by_chance']:.2g}), KS {found['ks']:.3g} (p {found['ks_p_value']:.2g})"
        )
        label = " " * len(label)
    if before["series"] != drift["series"]:
        print(f"{label}against another model, {before['series']}", flush=True)
