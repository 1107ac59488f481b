"""raysys coreset score | select | report, end to end on digits, and their bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.session import Session
from jobs.coreset import report
from jobs.coreset.__main__ import command_line
from jobs.coreset.report import ReportConfig
from jobs.coreset.score import ScoreConfig
from jobs.coreset.select import SelectConfig
from jobs.coreset.source import SourceConfig
from jobs.launcher import JobContext
from raysys.errors import ConfigError, DataError, StorageError
from raysys.runs import RunDirectory
from raysys.training.ccs.auto_beta import AutoBetaConfig
from raysys.training.ccs.coreset import Coreset, save_coreset
from raysys.training.ccs.proxy import ProxyConfig
from raysys.training.ccs.selection import SelectionConfig, select_ccs
from raysys.training.ccs.table import ScoreTable

PROXY = ProxyConfig(channels=(4, 8, 8), iterations=30, score_iterations=60, batch=64)


class SharedContext(JobContext):
    """A job's context on the test run's cluster."""

    def __init__(self, path: Path, session: Session) -> None:
        run = RunDirectory.create(str(path), job="test", config={}, seeds=[], now="now")
        super().__init__(run, None, resumed=False)  # type: ignore[arg-type]
        self._session = session


@pytest.fixture(scope="module")
def scored(ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scoring run on digits with the noise estimate, shared by the tests of this file."""
    from jobs.coreset import score

    path = tmp_path_factory.mktemp("score") / "run"
    context = SharedContext(path, ray_cluster)
    summary = score.run(ScoreConfig(proxy=PROXY, noise=True), context)
    assert "1400 examples scored" in summary.lines[0]
    return path


def select(scored: Path, tmp_path: Path, session: Session, **changes: object) -> Path:
    from jobs.coreset import select as job

    values = {"scores": (f"{scored}/scores.parquet",), "alpha": 0.9, **changes}
    path = tmp_path / f"select-{len(list(tmp_path.iterdir()))}"
    job.run(SelectConfig(**values), SharedContext(path, session))  # type: ignore[arg-type]
    return path


def test_score_writes_scores_features_and_noise(scored: Path) -> None:
    result = json.loads((scored / "result.json").read_text())
    assert result["rows"] == 1400
    assert result["test_accuracy"] > 0.7
    assert 0 <= result["noise"]["rate"] < 0.5
    columns = set(pq.read_table(scored / "scores.parquet").column_names)
    assert {"id", "label", "aum", "el2n", "forgetting", "correctness", "entropy", "loss"} <= columns


def test_scoring_can_end_when_the_order_has_settled() -> None:
    from jobs.coreset.score import scoring_task

    config = ScoreConfig(proxy=PROXY, settled=0.3)
    found = scoring_task(config.data.load(), config, None)
    assert found["correlations"][-1] > 0.3
    assert len(found["table"]) == 1400
    with pytest.raises(ConfigError, match="settled"):
        ScoreConfig(settled=1.5)


def test_select_and_report(scored: Path, tmp_path: Path, ray_session: Session) -> None:
    from jobs.coreset import report

    chosen = select(scored, tmp_path, ray_session, class_balanced=True)
    again = select(scored, tmp_path, ray_session, class_balanced=True, partitions=3)
    coreset = Coreset.load(str(chosen / "coreset"))
    np.testing.assert_array_equal(coreset.ids, Coreset.load(str(again / "coreset")).ids)
    assert len(coreset.ids) == 140
    assert coreset.manifest["beta"] == pytest.approx(0.14)
    files = coreset.manifest["score_files"]
    assert len(next(iter(files.values()))) == 64
    path = tmp_path / "report"
    config = ReportConfig(
        coreset=str(chosen / "coreset"), scores=str(scored / "scores.parquet"),
        features=str(scored / "features.npz"), data=SourceConfig(), proxy=PROXY, seeds=1,
    )  # fmt: skip
    summary = report.run(config, SharedContext(path, ray_session))
    assert any("AUC_pr" in line for line in summary.lines)
    result = json.loads((path / "result.json").read_text())
    assert set(result["accuracy"]) == set(result["auc_pr"]) == {"coreset", "random", "hardest"}
    assert "<svg" in (path / "report.html").read_text()


def test_select_auto_beta_and_dry_run(scored: Path, tmp_path: Path, ray_session: Session) -> None:
    search = AutoBetaConfig(betas=(0.0, 0.1), repeats=1)
    path = select(
        scored, tmp_path, ray_session, beta="auto", data=SourceConfig(), proxy=PROXY,
        search=search, dry_run=True,
    )  # fmt: skip
    result = json.loads((path / "result.json").read_text())
    assert result["auto_beta"]["beta"] in (0.0, 0.1)
    assert result["beta"] == result["auto_beta"]["beta"]
    assert not (path / "coreset").exists()


def test_a_report_on_another_data_set_is_refused(
    scored: Path, tmp_path: Path, ray_session: Session
) -> None:
    from jobs.coreset import report

    chosen = select(scored, tmp_path, ray_session)
    config = ReportConfig(
        coreset=str(chosen / "coreset"), scores=str(scored / "scores.parquet"),
        data=SourceConfig(seed=1), proxy=PROXY,
    )  # fmt: skip
    with pytest.raises(DataError, match="fingerprint"):
        report.run(config, SharedContext(tmp_path / "report", ray_session))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scores": ()}, "scores"),
        ({"alpha": None}, "either alpha or m"),
        ({"m": 5}, "either alpha or m"),
        ({"alpha": 1.5}, "alpha"),
        ({"beta": "best"}, "or auto"),
        ({"beta": "auto"}, r"data\.name"),
        ({"partitions": 0}, "partitions"),
    ],
)
def test_bad_selections(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SelectConfig(**{"scores": ("a.parquet",), "alpha": 0.9, **changes})  # type: ignore[arg-type]


def test_sources_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y, ids=np.arange(20) + 5)
    split = SourceConfig(name=str(tmp_path / "a.npz")).load()
    assert (len(split.train), len(split.test), split.train.classes) == (16, 4, 2)
    assert split.train.ids.min() >= 5
    np.savez(tmp_path / "b.npz", x=x, y=y, x_test=x[:5], y_test=y[:5])
    assert len(SourceConfig(name=str(tmp_path / "b.npz")).load().test) == 5
    pq.write_table(
        pa.table({"id": np.arange(20), "label": y, "features": list(x)}), tmp_path / "c.parquet"
    )
    assert SourceConfig(name=str(tmp_path / "c.parquet")).load().train.x.shape == (16, 3)
    np.savez(tmp_path / "d.npz", x=x)
    (tmp_path / "e.npz").write_bytes(b"junk")
    np.savez(tmp_path / "f.npz", x=np.full((4, 2), np.nan), y=np.arange(4) % 2)
    np.savez(tmp_path / "g.npz", x=x, y=np.eye(20))
    for name, error, text in (
        ("d.npz", DataError, "no array 'y'"),
        ("e.npz", DataError, "not a readable"),
        ("f.npz", ConfigError, "finite inputs"),
        ("g.npz", ConfigError, "multi-label"),
        ("h.npz", StorageError, "does not exist"),
        ("h.csv", ConfigError, "one of digits"),
    ):
        with pytest.raises(error, match=text):
            SourceConfig(name=str(tmp_path / name)).load()


def test_command_line_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line([]) == 2
    assert "score, select, report" in capsys.readouterr().err
    assert command_line(["--help"]) == 0
    assert "raysys coreset score" in capsys.readouterr().out
    assert command_line(["select", "--set", "alpha=0.9"]) == 2
    assert "scores" in capsys.readouterr().err


def test_each_bar_of_the_report_is_a_stratum(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = ScoreTable(np.arange(2000), {"aum": rng.normal(size=2000)}, None)
    config = SelectionConfig(beta=0.1, strata=20)
    selection = select_ccs(table, 300, config)
    saved = save_coreset(str(tmp_path / "coreset"), selection, config)
    edges = report.strata_edges(saved.manifest)
    bins = report._bins(table.score("aum"), edges)
    counts, _ = np.histogram(table.score("aum")[table.rows_of(saved.ids)], bins)
    assert counts[-20:].tolist() == selection.quotas.tolist()
    assert counts[:-20].sum() == 0
    assert report.kept_plot(table, {"coreset": saved.ids}, "aum", edges).figure.axes
