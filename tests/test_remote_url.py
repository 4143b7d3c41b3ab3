"""URLs of tiers elsewhere: what they are refused for, and how they are named."""

from __future__ import annotations

import pytest

from kvstrata.errors import ConfigError
from kvstrata.remote_url import RemoteURL


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://host?tls_ca=/ca.pem", "tls_ca is for TLS: write rediss://"),
        ("redis+cluster://host?tls_verify=no", "tls_verify is for TLS"),
        ("unix:///run/socket?tls_key=/key.pem", "tls_key is for TLS"),
        ("redis+cluster://host/5", "a cluster has no database but 0"),
        ("valkeys+cluster://host?db=1", "a cluster has no database but 0"),
        ("redis://host/0?db=3", "db is given twice: in the URL and as db"),
        ("unix:///run/socket?db=1&db=2", "db is given twice"),
        ("redis://hunter2@host?username=x", "username is given twice"),
        ("redis://:hunter2@host?password_env=X", "password is given twice: in the URL and as password_env"),
        ("redis://host?password_env=X&password_file=/x", "password is given twice: as two options"),
        ("s3://x:hunter2@bucket?secret_key_file=/x", "secret_key is given twice"),
        ("redis://host/²", "the database must be a number, not '²'"),
        ("redis://host?db=x", "the database must be a number, not 'x'"),
        ("redis://host:0", "port of redis://host is no number from 1 to 65535"),
        ("redis://user:12/hunter2@host/0", "escape / in a password as %2F"),
        ("redis://user:12?hunter2@host/0", "escape .* as %3F"),
        ("redis://user:12?hunter2&x=y@host/0", "escape .* as %3F"),
        ("redis://user:12#hunter2@host/0", "escape .* as %23"),
        ("s3://user:1/hunter2@bucket/prefix", "escape / in a password as %2F"),
        ("unix://:1/hunter2@/run/socket", "escape / in a password as %2F"),
    ],
)
def test_a_url_of_which_something_would_be_ignored_is_refused_and_no_secret_is_told(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        RemoteURL.parse(url)
    assert "hunter2" not in f"{raised.value!r} {raised.value.__cause__!r}"


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("redis://:p%40s%2Fs%3F%23@host/3", "redis://host/3"),
        ("redis+cluster://host/0", "redis+cluster://host/0"),
        ("rediss://user@[::1]:7000/1?tls_verify=no&password_env=X", "rediss://[::1]:7000/1"),
        ("unix:///run/a%40b?db=2&username=x", "unix:///run/a%40b"),
        ("s3://key@bucket/at%40?secret_key_env=X", "s3://bucket/at%40"),
        ("redis://host?prefix=a@b", "redis://host"),
    ],
)
def test_a_url_is_named_without_user_password_and_options(url: str, label: str) -> None:
    assert repr(RemoteURL.parse(url)) == f"<remote {label}>"
