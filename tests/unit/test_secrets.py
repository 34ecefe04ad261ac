"""What must never be written: found in addresses, and hidden in messages."""

import os
import pickle

import pytest

from ais.config import HeatmapsConfig
from ais.errors import ConfigError, StorageError
from ais.pipeline.credentials import adopt, worker_setup
from ais.secrets import redact, secret_in
from ais.settings import parse_config, to_yaml
from ais.storage import Storage

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
WITH_SECRETS = {
    f"s3://AKIAIOSFODNN7:{SECRET}@bucket/images": "a key",
    f"S3://key:{SECRET}@bucket": "a key",
    "https://user:wJalrXUtnFEMI@host/images": "a password",
    "ftp://user:wJalrXUtnFEMI@host:21/images": "a password",
    f"https://b.s3.amazonaws.com/a.jpg?X-Amz-Date=1&X-Amz-Signature={SECRET}": "the parameter 'X-Amz-Signature'",
    f"https://host/a.jpg?versionId=3&sig={SECRET}": "the parameter 'sig'",
    f"https://host/a.jpg?AWSAccessKeyId=AKIA&Signature={SECRET}": "the parameter 'AWSAccessKeyId'",
    f"https://host/a.jpg?access_token={SECRET}": "the parameter 'access_token'",
    f"http://host/a.jpg?x=1&api_key={SECRET}": "the parameter 'api_key'",
}
WITHOUT = [
    "/photos/a@b:c/x?sig=1.png",
    "photos/key=1&token=2.png",
    "s3://bucket/a@b/c:d?token=1.png",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/photos/key",
    "https://host:8443/a%20b.jpg?download=1&size=300",
    "https://host/a@b:c.jpg",
    "abfs://photos@account.dfs.core.windows.net/a.jpg",
    "hdfs://user@host:9000/photos",
    "memory://a",
]


@pytest.mark.parametrize(("address", "found"), WITH_SECRETS.items())
def test_an_address_with_a_secret_is_refused_everywhere_and_shown_nowhere(address: str, found: str) -> None:
    assert secret_in(address) == found
    for text in (redact(address), redact(f"ClientError: url={address!r} failed"), redact(f"at {address}, sorry")):
        assert "wJalrXUtnFEMI" not in text
        assert "K7MDENG" not in text
        assert "***" in text
    with pytest.raises(ConfigError, match=f"images: .*carries {found}.*~/.aws/credentials") as refused:
        parse_config(HeatmapsConfig, "", [f"images={address}", "output=o", "head=h"])
    assert "wJalrXUtnFEMI" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"backbone\.weights") as refused:
        parse_config(HeatmapsConfig, "", [f"backbone.weights={address}", "images=i", "output=o", "head=h"])
    assert "wJalrXUtnFEMI" not in str(refused.value)
    with pytest.raises(StorageError, match="cannot be opened") as refused_later:
        Storage().open(address)
    assert "wJalrXUtnFEMI" not in str(refused_later.value)


@pytest.mark.parametrize("address", WITHOUT)
def test_other_addresses_are_left_alone(address: str) -> None:
    assert secret_in(address) is None
    assert parse_config(HeatmapsConfig, "", [f"images={address}", "output=o", "head=h"]).images == address
    if address.startswith(("https", "abfs", "hdfs")):
        assert redact(f"error: {address}") == f"error: {address}"


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "x")  # too short to be one
    assert redact(f"signed with {SECRET}: axis") == "signed with ***: axis"
    assert redact("s3://bucket: no such key 'a:b'") == "s3://bucket: no such key 'a:b'"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("s3.endpoint_url=http://x", "'endpoint_url' is for S3, which has keys of its own"),
        ("gs.token=abcdefgh", "'token' is a secret"),
        ("abfs.account_key=abcdefgh", "'account_key' is a secret"),
        ("abfs.sas_token=abcdefgh", "'sas_token' is a secret"),
        ("sftp.password=abcdefgh", "'password' is a secret"),
        ("http.headers=abcdefgh", "'headers' is a secret"),
        ("abcdefgh", "expected scheme.option=value"),
    ],
)
def test_options_of_other_filesystems_carry_no_secrets(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_config(HeatmapsConfig, "", [f"storage.options=[{option}]", "images=i", "output=o", "head=h"])
    if "=" in option:
        assert "abcdefgh" not in str(refused.value)


def test_options_reach_their_filesystem_and_no_other() -> None:
    text = "images: i\noutput: o\nhead: h\nstorage:\n  options: [gs.project=photos, gs.requester_pays=true, abfs.a=b]\n"
    config = parse_config(HeatmapsConfig, text)
    assert parse_config(HeatmapsConfig, to_yaml(config)) == config
    storage = Storage(**config.storage.model_dump())
    assert storage.options_of("gs://bucket/key") == {"project": "photos", "requester_pays": True}
    assert storage.options_of("/photos") == {}
    assert "project" not in storage.options_of("s3://bucket")
    assert storage.for_threads(200).max_connections == 200
    assert storage.for_threads(2) == storage


def test_workers_adopt_what_their_machine_has_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    assert worker_setup() is None
    given = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://driver"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    setup = worker_setup()
    assert setup is not None
    nothing: dict[str, str] = {}
    adopt(given, nothing)
    assert nothing == given
    own = {"AWS_ACCESS_KEY_ID": "own", "AWS_ENDPOINT_URL": "http://own"}  # the secret is in a file, perhaps
    adopt({**given, "AWS_REGION": "eu"}, own)
    assert own == {"AWS_ACCESS_KEY_ID": "own", "AWS_ENDPOINT_URL": "http://own", "AWS_REGION": "eu"}
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(setup)  # by value only, as Ray does it: the values are in it
