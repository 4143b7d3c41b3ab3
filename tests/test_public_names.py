"""What the package offers by name."""

from __future__ import annotations

import inspect

import kvstrata
from kvstrata import codecs, errors


def test_the_package_exports_exactly_these_names() -> None:
    assert sorted(kvstrata.__all__) == ["Cache", "KVLayout", "Match", "Namespace", "PrefixCache", "__version__", "open"]
    assert all(hasattr(kvstrata, name) for name in kvstrata.__all__)


def test_every_error_is_a_kvstrata_error_and_is_exported() -> None:
    defined = {name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    assert defined == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.KVStrataError) for name in defined)


def test_the_codecs_are_made_and_described_by_these_names() -> None:
    assert sorted(codecs.__all__) == [
        "AXES", "CODECS", "Codec", "ErrorStats", "Keyring", "PartError", "TensorInfo", "codec", "decoder", "encode",
        "train_dictionary",
    ]  # fmt: skip
    assert all(hasattr(codecs, name) for name in codecs.__all__)


def test_open_takes_its_options_by_keyword_only() -> None:
    parameters = inspect.signature(kvstrata.open).parameters
    assert list(parameters) == [
        "path", "memory", "disk", "disk_policy", "disk_write_limit", "disk_engine", "shared", "huge_pages",
        "prefetch", "near", "encryption", "remote", "config",
    ]  # fmt: skip
    assert [p.default for p in parameters.values()] == [None] * 13
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "path")


def test_the_verbs_of_a_namespace_are_those_of_the_manual() -> None:
    public = {name for name in dir(kvstrata.Namespace) if not name.startswith("_")}
    assert public == {
        "clear", "contains_prefix", "delete", "delete_many", "delete_prefix", "delete_tag", "get", "get_many",
        "get_or_compute", "keys", "memoize", "name", "objects", "pin", "pin_many", "prefetch", "put", "put_many",
        "reserve", "version", "warm",
    }  # fmt: skip
