"""Where the options of a cache come from."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvstrata
from kvstrata.errors import ConfigError, UnknownOption
from kvstrata.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvstrata.toml"
    path.write_text('memory = "3MiB"\ndisk = 4194304\nshared = false\nremote = ["redis://file", "unix:///file"]\n')
    return path


def gather(file: Path | None = None, environment: dict[str, str] | None = None, **arguments: object) -> Settings:
    return Settings.gather({"path": "/somewhere"} | arguments, config=file, environment=environment or {})


def test_without_anything_the_defaults_hold() -> None:
    settings = Settings.gather({}, config=None, environment={})
    assert settings.path is None
    assert (settings.options.memory, settings.options.disk) == (1 << 30, 0)
    assert (settings.shared, settings.huge_pages, settings.remotes) == (True, False, [])
    assert settings.near == 64 << 20
    assert Settings.gather({"memory": "64MiB"}, config=None, environment={}).near == 4 << 20
    assert Settings.gather({"near": 0}, config=None, environment={}).near == 0


def test_an_argument_goes_before_the_environment_and_that_before_the_file(file: Path) -> None:
    environment = {"KVSTRATA_MEMORY": "2MiB", "KVSTRATA_REMOTE": "redis://a redis://b"}
    settings = gather(file, environment)
    assert (settings.options.memory, settings.options.disk, settings.shared) == (2 << 20, 4 << 20, False)
    assert [url.label for url in settings.remotes] == ["redis://a", "redis://b"]
    settings = gather(file, environment, memory="1MiB", shared=True, remote="unix:///argument")
    assert (settings.options.memory, settings.options.disk, settings.shared) == (1 << 20, 4 << 20, True)
    assert [url.label for url in settings.remotes] == ["unix:///argument"]
    assert [url.label for url in gather(file).remotes] == ["redis://file", "unix:///file"]
    assert gather(file, remote=[]).remotes == []


def test_every_option_can_stand_in_the_environment(tmp_path: Path) -> None:
    settings = Settings.gather(
        {},
        config=None,
        environment={
            "KVSTRATA_PATH": str(tmp_path), "KVSTRATA_MEMORY": "4194304", "KVSTRATA_DISK": "0", "KVSTRATA_SHARED": "no",
            "KVSTRATA_HUGE_PAGES": "1", "KVSTRATA_REMOTE": "redis://a",
        },
    )  # fmt: skip
    assert (settings.path, settings.options.memory, settings.options.disk) == (tmp_path, 4 << 20, 0)
    assert (settings.shared, settings.huge_pages, len(settings.remotes)) == (False, True, 1)


def test_the_environment_can_name_the_file(file: Path) -> None:
    assert gather(None, {"KVSTRATA_CONFIG": str(file)}).options.memory == 3 << 20


@pytest.mark.parametrize(
    ("environment", "text", "names"),
    [
        ({"KVSTRATA_MEMORY": "lots"}, "", r"\$KVSTRATA_MEMORY"),
        ({"KVSTRATA_SHARED": "perhaps"}, "", r"\$KVSTRATA_SHARED"),
        ({"KVSTRATA_REMOTE": "redos://a"}, "", r"\$KVSTRATA_REMOTE"),
        ({}, 'memory = "lots"', "kvstrata.toml"),
        ({}, "memory = [1]", "kvstrata.toml.*memory"),
        ({}, 'shared = "no"', "kvstrata.toml.*shared"),
        ({}, 'remote = "redis://"', "kvstrata.toml"),
        ({}, "memory = ", "kvstrata.toml is not TOML"),
    ],
)
def test_an_error_names_the_source_of_the_value(
    tmp_path: Path, environment: dict[str, str], text: str, names: str
) -> None:
    file = tmp_path / "kvstrata.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names):
        gather(file, environment)


def test_an_empty_path_is_refused_and_not_the_current_directory(tmp_path: Path) -> None:
    file = tmp_path / "kvstrata.toml"
    file.write_text('path = ""')
    with pytest.raises(ConfigError, match=r"\$KVSTRATA_PATH: path is empty; write '\.'"):
        Settings.gather({}, config=None, environment={"KVSTRATA_PATH": ""})
    with pytest.raises(ConfigError, match=r"kvstrata.toml: path is empty"):
        Settings.gather({}, config=file, environment={})
    with pytest.raises(ConfigError, match=r"^path is empty"):
        gather(path="")


def test_an_unknown_name_in_the_file_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "kvstrata.toml"
    file.write_text('memroy = "1MiB"\n')
    with pytest.raises(UnknownOption, match="'memory'"):
        gather(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        gather(tmp_path / "absent.toml")


def test_a_cache_is_opened_as_the_file_says(shm: Path, tmp_path: Path) -> None:
    file = tmp_path / "kvstrata.toml"
    file.write_text(f'path = "{tmp_path / "cache"}"\nmemory = "2MiB"\ndisk = 0\n')
    with kvstrata.open(config=file) as cache:
        assert (cache.path, cache.options.memory) == (tmp_path / "cache", 2 << 20)


def test_a_secret_that_stands_in_a_file_or_variable_is_not_in_an_error(tmp_path: Path) -> None:
    for source in ({"KVSTRATA_REMOTE": "redis://u:hunter2@host:port"}, {"KVSTRATA_REMOTE": "redos://u:hunter2@host"}):
        with pytest.raises(ConfigError) as raised:
            gather(None, source)
        assert "hunter2" not in str(raised.value)
