"""A checkpoint's own Python code runs by the sweep's word and by nothing else.

The model here is a folder whose configuration names a module beside it, as on the hub. What
the module does when it is imported, it did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SweepError
from orchestrator.request import Request, prepare
from tests.contract import tiny
from tests.integration.harness import TINY
from workers import runner
from workers.contract.engine import EngineSettings
from workers.contract.job import Job, Ticket
from workers.contract.message import Finished
from workers.contract.model import Model
from workers.moe.architecture import bend, catalogue

MODULE = """
from pathlib import Path
from transformers import MixtralConfig

Path({mark!r}).write_text("code was run")


class TheirConfig(MixtralConfig):
    pass
"""


@pytest.mark.parametrize(
    "sweep",
    [
        {"base": {"engine": {"args": {"trust_remote_code": True}}}},
        {"base": {"engine.args.trust_remote_code": False}},
        {"grid": {"engine.args.trust_remote_code": [True, False]}},
        {"grid": {"engine.args": [{}, {"trust_remote_code": True}]}},
        {"zip": {"engine.args.trust_remote_code": [True]}},
        {"cases": [{"engine": {"args": {"trust_remote_code": True}}}]},
        {"profiles": {"h100": {"base": {"engine.args.trust_remote_code": True}}}},
    ],
)
def test_it_is_not_said_behind_the_records_back(tmp_path: Path, sweep: dict[str, Any]) -> None:
    path = tmp_path / "s.yaml"
    base = {"model.name": "mixtral-8x7b", **sweep.get("base", {})}
    path.write_text(json.dumps({"name": "s", **sweep, "base": base}))
    with pytest.raises(SweepError, match=r"write model\.trust_remote_code"):
        prepare(Request(sweep=path), "h100")


def test_no_trial_can_be_made_that_says_it_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"write model\.trust_remote_code"):
        EngineSettings(args={"trust_remote_code": True})
    assert Model(name="mixtral-8x7b").trust_remote_code is False


def _model(folder: Path) -> tuple[Path, Path]:
    """A folder with code of its own, and the file that this code would write."""
    mark = folder / "mark"
    small = Model(name="m", weights="dummy", scale=0.0625, num_layers=2, ffn_dim=3584)
    config = bend(catalogue()["mixtral-8x7b"]["config"], small)
    model = folder / "model"
    model.mkdir()
    auto = {"AutoConfig": "configuration_theirs.TheirConfig"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (model / "configuration_theirs.py").write_text(MODULE.format(mark=str(mark)))
    return model, mark


@pytest.mark.engine
@pytest.mark.timeout(280)
def test_it_runs_where_the_sweep_says_so_and_the_record_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = _model(tmp_path)
    file = model / "config.json"
    auto = {"auto_map": json.loads(file.read_text())["auto_map"]}
    tiny.checkpoint(model, "mixtral", dtype="bfloat16")
    file.write_text(json.dumps(json.loads(file.read_text()) | auto))
    sweep = TINY["base"] | {"model": {"name": str(model)}, "engine": {"eager": True}}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": sweep}))

    def run(*overrides: str) -> dict[str, Any]:
        """The record of the sweep's one trial, as a host makes it."""
        _, planned = prepare(Request(sweep=path, overrides=overrides), "cpu")
        assert not mark.exists(), "planning reads no code"
        (group,) = planned.groups
        (one,) = group.trials
        ticket = Ticket(trial=one.trial, trial_id=one.trial_id)
        job = Job(sweep="s", run_id="r", group_id="g", profile="cpu", tickets=(ticket,))
        (done,) = [told for told in runner.run(job) if isinstance(told, Finished)]
        row: dict[str, Any] = done.record.to_pylist()[0]
        return row

    quiet = run()
    assert quiet["outcome"] in ("ok", "unsupported"), quiet["outcome_reason"]
    assert quiet["trust_remote_code"] is False and not mark.exists()

    trusting = run("base.model.trust_remote_code=true")
    assert trusting["outcome"] == "ok", trusting["outcome_reason"]
    assert trusting["trust_remote_code"] is True and mark.read_text() == "code was run"
    assert json.loads(trusting["engine_args"])["trust_remote_code"] is True
    assert trusting["trial_id"] != quiet["trial_id"]
