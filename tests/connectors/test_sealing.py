"""What `connectors.sealing` promises about secrets at rest."""

from __future__ import annotations

import base64
import json
import os
import pickle

import pytest
from django.core.exceptions import ImproperlyConfigured

from connectors.sealing import Secret, UnsealError, seal, unseal

CONTEXT = "connection/7/https://api.example"


def new_key() -> str:
    return base64.urlsafe_b64encode(os.urandom(32)).decode()


@pytest.fixture(autouse=True)
def keys(settings):
    settings.SEALING_KEYS = [new_key()]
    return settings.SEALING_KEYS


@pytest.mark.parametrize("plain", ["", "sk_live_1", "é\u0000ß" * 1000])
def test_a_sealed_value_opens_to_what_was_sealed(plain):
    sealed = seal(plain, context=CONTEXT)
    assert sealed.startswith("v1:")
    assert not plain or plain not in sealed
    assert unseal(sealed, context=CONTEXT) == plain


def test_sealing_twice_gives_different_values():
    assert seal("a", context=CONTEXT) != seal("a", context=CONTEXT)


def test_a_value_moved_to_another_row_or_host_does_not_open():
    with pytest.raises(UnsealError, match="another record or host"):
        unseal(seal("a", context=CONTEXT), context=CONTEXT + ".evil")


def test_a_changed_value_does_not_open():
    version, key_id, payload = seal("a", context=CONTEXT).split(":")
    for position in range(len(payload.rstrip("="))):
        other = "A" if payload[position] != "A" else "B"
        changed = payload[:position] + other + payload[position + 1 :]
        if base64.urlsafe_b64decode(changed) == base64.urlsafe_b64decode(payload):
            continue  # only padding bits differ
        with pytest.raises(UnsealError):
            unseal(f"{version}:{key_id}:{changed}", context=CONTEXT)


@pytest.mark.parametrize("sealed", ["", "plain", "v1:", "v2:00000000:AAAA", "v1:00000000:AAAA", "v1:x:ü"])
def test_what_was_never_sealed_is_refused(sealed):
    with pytest.raises(UnsealError):
        unseal(sealed, context=CONTEXT)


@pytest.mark.parametrize("payload", ["A", "AAAA", "!!!!", "ü"])
def test_a_damaged_payload_is_refused(payload):
    prefix = seal("a", context=CONTEXT).rpartition(":")[0]
    with pytest.raises(UnsealError):
        unseal(f"{prefix}:{payload}", context=CONTEXT)


def test_a_new_first_key_seals_and_the_old_one_still_opens(settings, keys):
    old = seal("a", context=CONTEXT)
    settings.SEALING_KEYS = [new_key(), *keys]
    new = seal("a", context=CONTEXT)
    assert old.split(":")[1] != new.split(":")[1]
    assert unseal(old, context=CONTEXT) == unseal(new, context=CONTEXT) == "a"
    settings.SEALING_KEYS = settings.SEALING_KEYS[:1]
    assert unseal(new, context=CONTEXT) == "a"
    with pytest.raises(UnsealError, match="Put that key back"):
        unseal(old, context=CONTEXT)


@pytest.mark.parametrize("wrong", [[], ["short"], ["!" * 43], [base64.b64encode(b"x" * 31).decode()]])
def test_without_a_usable_key_nothing_is_sealed(settings, wrong):
    sealed = seal("a", context=CONTEXT)
    settings.SEALING_KEYS = wrong
    with pytest.raises(ImproperlyConfigured, match="SEALING_KEYS"):
        seal("a", context=CONTEXT)
    with pytest.raises(UnsealError, match="SEALING_KEYS"):
        unseal(sealed, context=CONTEXT)


def test_a_key_without_padding_is_the_same_key(settings, keys):
    sealed = seal("a", context=CONTEXT)
    settings.SEALING_KEYS = [keys[0].rstrip("=")]
    assert unseal(sealed, context=CONTEXT) == "a"


def test_a_secret_shows_itself_only_when_asked():
    secret = Secret("sk_live_1")
    for shown in (str(secret), repr(secret), f"{secret}", f"{secret:>20}", "%s" % secret, repr([secret])):  # noqa: UP031
        assert "sk_live" not in shown
        assert "***" in shown
    assert secret.reveal() == "sk_live_1"
    assert secret == Secret("sk_live_1") != Secret("other")
    assert secret != "sk_live_1"
    assert len({secret, Secret("sk_live_1")}) == 1
    assert not Secret("")
    for leak in (json.dumps, pickle.dumps, "".join, lambda it: "Bearer " + it):
        with pytest.raises(TypeError):
            leak(secret)
