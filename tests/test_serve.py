"""The server, with the real model and real clients: the same answers as without a cache, from any of its workers."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

import httpx
from support.openai_server import REQUEST_LIMIT_S, Served, chat

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1500)]

TEXT = "A lighthouse stands at the end of a long sandy spit. " * 6 + "What stands there?"


@pytest.fixture(scope="module")
def served(smollm_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers with one cache."""
    place = tmp_path_factory.mktemp("served")
    options = ["--workers", "2", "--memory", "256MiB", "--path", str(place / "cache")]
    server = Served(smollm_directory, *options, TMPDIR=str(place))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected(smollm: Any) -> Any:
    """What the model answers by itself: text, and tokens of prompt and answer."""
    model, tokenizer, _ = smollm

    def answer(text: str, most: int = 16, *, raw: bool = False) -> tuple[str, int, int]:
        messages = [{"role": "user", "content": text}]
        inputs = (
            tokenizer(text, return_tensors="pt")
            if raw
            else tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
        count = inputs["input_ids"].shape[1]
        output = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=most
        )[0]
        return tokenizer.decode(output[count:], skip_special_tokens=True), count, len(output) - count

    return answer


def streamed(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which has to end as it should."""
    chunks = []
    with httpx.stream(
        "POST", f"{served.url}{path}", json={**body, "stream": True}, timeout=REQUEST_LIMIT_S
    ) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                chunks.append(line.removeprefix("data: "))
    assert chunks.pop() == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


# ---- Answers


def test_a_chat_has_the_same_answer_with_and_without_the_cache(served: Served, expected: Any) -> None:
    text, prompt, new = expected(TEXT)
    answers = [served.chat(TEXT) for _ in range(2)]

    for answer in answers:
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["choices"][0]["finish_reason"] == ("length" if new == 16 else "stop")
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
            prompt,
            new,
            prompt + new,
        )
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == (prompt - 1) // 32 * 32


def test_what_one_worker_computed_is_reused_by_the_other(served: Served, expected: Any) -> None:
    question = TEXT.replace("lighthouse", "watchtower")
    text, prompt, _ = expected(question)
    cached = []
    for worker in sorted(served.workers(2)):
        with served.connected(worker) as client:
            answer = served.chat(question, client)
        assert answer["choices"][0]["message"]["content"] == text
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached[0] < cached[1] == (prompt - 1) // 32 * 32


def test_a_chat_goes_on_where_it_was(served: Served) -> None:
    first = served.chat(TEXT, prompt_cache_key="chat-1", max_tokens=8)
    messages = [
        {"role": "user", "content": TEXT}, {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And then?"},
    ]  # fmt: skip
    second = served.chat("", prompt_cache_key="chat-1", messages=messages)

    # All tokens of the first turn but for the last, whose KV was never computed, and not just full blocks.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] + 8 - 1


@pytest.mark.parametrize("as_tokens", [False, True], ids=["text", "tokens"])
def test_a_completion_has_the_same_answer(served: Served, expected: Any, smollm: Any, as_tokens: bool) -> None:
    text, prompt, new = expected("The keepers of the lighthouse", 12, raw=True)
    given = smollm[1]("The keepers of the lighthouse")["input_ids"] if as_tokens else "The keepers of the lighthouse"
    response = served.post("/v1/completions", {"model": "smol", "prompt": given, "temperature": 0, "max_tokens": 12})

    assert response.json()["object"] == "text_completion"
    assert response.json()["choices"][0]["text"] == text
    assert (response.json()["usage"]["prompt_tokens"], response.json()["usage"]["completion_tokens"]) == (prompt, new)


def test_a_stream_has_the_same_text_in_parts_and_its_usage_last(served: Served, expected: Any) -> None:
    text, prompt, new = expected(TEXT, 24)
    chunks = streamed(served, "/v1/chat/completions", chat(TEXT, max_tokens=24, stream_options={"include_usage": True}))
    usage = chunks.pop()

    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert len(chunks) > 6
    assert (usage["choices"], usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == ([], prompt, new)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(served: Served, expected: Any) -> None:
    text, _, _ = expected(TEXT, 24)
    stop = text[10:14]
    whole = served.chat(TEXT, max_tokens=24, stop=stop)["choices"][0]
    chunks = streamed(served, "/v1/chat/completions", chat(TEXT, max_tokens=24, stop=[stop, "never said"]))

    assert (whole["message"]["content"], whole["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text[: text.index(stop)]


def test_a_seed_makes_sampling_repeatable(served: Served) -> None:
    drawn = [served.chat(TEXT, temperature=1.5, seed=seed)["choices"][0]["message"]["content"] for seed in (3, 3, 4)]

    assert drawn[0] == drawn[1] != drawn[2]


def test_openais_own_client_understands_it(served: Served, expected: Any) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=REQUEST_LIMIT_S)
    text, _, _ = expected(TEXT)
    options = {"model": "smol", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 16}

    assert [model.id for model in client.models.list()] == ["smol"]
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens_details.cached_tokens > 0
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(parts) == text
    with pytest.raises(openai.NotFoundError, match="not here"):
        client.chat.completions.create(**{**options, "model": "other"})


# ---- Bad requests


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "says"),
    [
        ("chat/completions", {"model": "other"}, 404, "model", "not here"),
        ("chat/completions", {"messages": []}, 400, "messages", "length >= 1"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "tool"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
            "type",
        ),
        ("chat/completions", {"temperature": 7}, 400, "temperature", "<= 2"),
        ("chat/completions", {"temperatur": 1}, 400, "temperatur", "unknown field"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ("chat/completions", {"max_tokens": 100_000}, 400, "max_tokens", "context"),
        ("chat/completions", {"n": 2}, 400, "n", "not supported"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ("chat/completions", {"logprobs": True}, 400, "logprobs", "not supported"),
        ("chat/completions", {"stop": [""]}, 400, "stop", "none of them empty"),
        ("completions", {"prompt": ["one", "two"]}, 400, "prompt", "requests of their own"),
        ("completions", {"prompt": []}, 400, "prompt", "one text"),
        ("completions", {"prompt": ""}, 400, "prompt", "empty"),
        ("completions", {"prompt": [10**9]}, 400, "prompt", "tokens from 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_request_gets_one_clear_error(
    served: Served, path: str, change: dict[str, Any], status: int, param: str, says: str
) -> None:
    body = chat("Hello", **change) if path == "chat/completions" else {"model": "smol", **change}
    response = served.post(f"/v1/{path}", body)

    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]


def test_what_is_no_json_and_what_is_not_there_is_said_so(served: Served) -> None:
    broken = httpx.post(f"{served.url}/v1/completions", content=b"{", timeout=REQUEST_LIMIT_S)
    absent = httpx.get(f"{served.url}/v1/embeddings", timeout=REQUEST_LIMIT_S)
    wrong = httpx.get(f"{served.url}/v1/completions", timeout=REQUEST_LIMIT_S)

    assert [response.status_code for response in (broken, absent, wrong)] == [400, 404, 405]
    assert all(response.json()["error"]["message"] for response in (broken, absent, wrong))


# ---- Operation


def test_metrics_are_those_of_all_workers_together(served: Served) -> None:
    served.chat(TEXT)
    seen = set()
    for worker in served.workers(2):
        with served.connected(worker) as client:
            seen.add(figure(client.get(f"{served.url}/metrics").text, 'kvstrata_serve_tokens_total{kind="generated"}'))
            text = client.get(f"{served.url}/metrics").text

    assert len(seen) == 1
    assert min(seen) >= 16
    assert figure(text, 'kvstrata_serve_tokens_total{kind="cached"}') > 0
    assert figure(text, "kvstrata_cache_memory_entries") > 0
    assert 'kvstrata_serve_ttft_seconds_bucket{cached="yes",le="0.05"}' in text


def test_a_killed_worker_harms_no_request_of_the_others_and_is_replaced(served: Served, expected: Any) -> None:
    text, _, _ = expected(TEXT, 40)
    victim, other = sorted(served.workers(2))
    with served.connected(other) as client:
        body = {**chat(TEXT, max_tokens=40), "stream": True}
        with client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            got = [next(lines)]
            os.kill(victim, signal.SIGKILL)
            got += [line for line in lines if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in got if line != "data: [DONE]"]

    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    replaced = served.workers(2)  # a worker that is dead answers nobody
    assert victim not in replaced
    assert other in replaced
    (new,) = replaced - {other}
    with served.connected(new) as client:
        answer = served.chat(TEXT, client, max_tokens=40)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_workers_are_forks_that_end_when_their_supervisor_is_killed(served: Served) -> None:
    """The last one here: it ends the server."""
    workers = sorted(served.workers(2))
    commands = {Path(f"/proc/{process}/cmdline").read_bytes() for process in (served.process.pid, *workers)}
    ends = [os.pidfd_open(worker) for worker in workers]
    served.process.kill()

    assert len(commands) == 1
    for end in ends:
        assert select.select([end], [], [], REQUEST_LIMIT_S)[0] == [end]
        os.close(end)


def figure(text: str, name: str) -> float:
    """A figure in Prometheus's text."""
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))
