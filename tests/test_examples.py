"""The programs in examples/, run as their first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.processes import python_path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(home: Path, name: str, *arguments: str) -> str:
    """What an example prints; it finds an empty home the first time."""
    environment = {
        **os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embeddings_are_computed_once(shm: Path, tmp_path: Path) -> None:
    texts = ["a lighthouse", "a sandy spit", "a lighthouse", "long " * 1000]

    assert run(tmp_path, "embeddings.py", *texts) == "4 texts, 3 computed, 384 dimensions\n"
    assert run(tmp_path, "embeddings.py", *texts, "a keeper") == "5 texts, 1 computed, 384 dimensions\n"


def test_the_second_question_about_a_text_and_the_next_run_reuse_its_kv(
    shm: Path, tmp_path: Path, smollm_directory: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("A lighthouse stands at the end of a long sandy spit, and nobody lives there now. " * 10)

    def reused(*questions: str) -> list[int]:
        said = run(tmp_path, "transformers_prefix.py", str(smollm_directory), str(text), *questions)
        return [int(number) for number in re.findall(r"reused_tokens=(\d+)", said)]

    first, second = reused("Who lives there?", "What stands there?")
    (again,) = reused("What stands there?")

    assert first == 0
    assert 100 < second <= again
