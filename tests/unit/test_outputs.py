"""Whose output a folder holds. Nothing is faked."""

from pathlib import Path

import pytest

from ais.errors import ConfigError
from ais.outputs import check_output
from ais.storage import Storage

OWN = ("head.json", "importance.json", "validation.json")


@pytest.mark.parametrize("own", OWN)
def test_a_job_writes_into_no_others_output(tmp_path: Path, own: str) -> None:
    check_output(str(tmp_path / "new"), own, Storage())
    (tmp_path / own).write_text("{}")
    check_output(str(tmp_path), own, Storage())
    for other in OWN:
        if other != own:
            with pytest.raises(ConfigError, match=r"output: '.*' holds a.* of jobs/.*\.py; give another output"):
                check_output(str(tmp_path), other, Storage())
