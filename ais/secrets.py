"""What must never be written: credentials in addresses, and those of the environment.

Addresses are written everywhere (manifest, results, errors, saved configuration, logs), so one that carries a password
or a signature is refused where it is first seen. Messages of other libraries may carry one too, such as that of a
redirect to a signed address: they pass `redact` before they are shown or kept.
"""

from __future__ import annotations

import os
import re

_HIDDEN = "***"
# Parameters of addresses that let whoever reads them in: those of signed addresses (AWS, Google, Azure, CloudFront) and
# the usual names of tokens and passwords.
_WORDS = "signature|credential|secret|passw|passphrase|token|access_?key|api_?key|auth"
_PARAMETER = rf"[\w.~-]*(?:{_WORDS})[\w.~-]*|sig|key|pwd|policy"
_SECRET_PARAMETER = re.compile(rf"([?&;#](?:{_PARAMETER})=)[^&;#\s'\"<>]+", re.IGNORECASE)
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s'\"@/]*:[^\s'\"@/]*@", re.IGNORECASE)
_S3_KEYS = re.compile(r"(\bs3a?://)(?!arn:)[^\s/'\"]*:[^\s'\"]+", re.IGNORECASE)
_HOLD_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_SHORTEST = 8  # what is shorter would also hide ordinary words


def redact(text: str) -> str:
    """Put ``***`` where a text shows a password, a signature, a token, or a secret of this process's environment."""
    for name in _HOLD_SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    text = _S3_KEYS.sub(rf"\1{_HIDDEN}", text)
    text = _PASSWORD.sub(rf"\1{_HIDDEN}@", text)
    return _SECRET_PARAMETER.sub(rf"\1{_HIDDEN}", text)


def secret_in(address: str) -> str | None:
    """Name what is secret in an address, or return ``None``.

    Found are ``scheme://user:password@host``, ``s3://key:secret@bucket``, and parameters with the name of a
    signature, token, key or password in addresses of the web, such as those of presigned addresses. In paths and in
    keys of object stores, ``?`` is an ordinary character.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return None
    scheme = scheme.lower()
    if scheme in ("s3", "s3a") and _S3_KEYS.match(address):
        return "a key"
    authority = rest.partition("/")[0]
    if ":" in authority.rpartition("@")[0]:
        return "a password"
    if scheme in ("http", "https") and (found := _SECRET_PARAMETER.search(address)):
        return f"the parameter {found[1].strip('?&;#=')!r}"
    return None


def refuse_secrets(address: str) -> str:
    """Return the address.

    Raises:
        ValueError: it carries a secret; the message does not show it.
    """
    if found := secret_in(address):
        raise ValueError(
            f"{redact(address)!r} carries {found}; addresses are written into every output, so credentials come from"
            " the environment or the files of the store's own tools only, such as ~/.aws/credentials"
        )
    return address
