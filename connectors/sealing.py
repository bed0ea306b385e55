"""Secrets at rest: AES-256-GCM under the first of `settings.SEALING_KEYS`.

A sealed value reads `v1:<key id>:<base64url(nonce + ciphertext)>`. Every listed key can open, so a
key is replaced by putting the new one first, sealing everything again, and then removing the old one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.views.decorators.debug import sensitive_variables

_VERSION = "v1"
_NONCE_BYTES = 12


class UnsealError(Exception):
    """A sealed value cannot be opened. The message names the remedy and is safe to show staff."""


class Secret:
    """A string that shows itself as '***' everywhere except through `reveal()`.

    Not a subclass of str: joining, encoding or serialising it by accident must fail, not leak.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __str__(self) -> str:
        return "***"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> str:
        raise TypeError("A Secret is not pickled: a pickle would hold it in clear.")


@sensitive_variables()
def seal(plain: str, *, context: str) -> str:
    """Encrypt `plain`, bound to `context` (which row and host it is for, say).

    Raises ImproperlyConfigured without a usable key: nothing is ever stored in clear instead.
    """
    key_id, key = next(iter(_keys().items()))
    nonce = os.urandom(_NONCE_BYTES)
    ciphertext = AESGCM(key).encrypt(nonce, plain.encode(), context.encode())
    return f"{_VERSION}:{key_id}:{base64.urlsafe_b64encode(nonce + ciphertext).decode()}"


@sensitive_variables()
def unseal(sealed: str, *, context: str) -> str:
    """The text given to `seal` with the same `context`; UnsealError if it cannot be had."""
    version, _, rest = sealed.partition(":")
    key_id, _, payload = rest.partition(":")
    if version != _VERSION or not payload:
        raise UnsealError("This is not a sealed value of a known version. Enter the secret again.")
    try:
        key = _keys().get(key_id)
    except ImproperlyConfigured as error:
        raise UnsealError(str(error)) from error
    if key is None:
        raise UnsealError(
            f"Sealed with key {key_id}, which SEALING_KEYS does not list. "
            "Put that key back into SEALING_KEYS, or enter the secret again."
        )
    try:
        data = base64.urlsafe_b64decode(payload)
        return AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context.encode()).decode()
    except (InvalidTag, ValueError):
        # `from None`: nothing of the ciphertext belongs into a traceback.
        raise UnsealError(
            "The sealed value was changed, or belongs to another record or host. Enter the secret again."
        ) from None


@sensitive_variables()
def _keys() -> dict[str, bytes]:
    """The configured keys by id, in their order. Read on use, so that tests and rotation see changes."""
    keys: dict[str, bytes] = {}
    for position, text in enumerate(settings.SEALING_KEYS, start=1):
        try:
            key = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ImproperlyConfigured(
                f"SEALING_KEYS: entry {position} must be 32 random bytes in base64url "
                "(python -c 'import base64, os; print(base64.urlsafe_b64encode(os.urandom(32)).decode())')."
            )
        keys[hashlib.sha256(key).hexdigest()[:8]] = key
    if not keys:
        raise ImproperlyConfigured("SEALING_KEYS is empty. Set a key; without one no secret is stored.")
    return keys
