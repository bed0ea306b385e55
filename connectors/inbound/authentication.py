"""API keys in the headers that the mirrored APIs document."""

from __future__ import annotations

from typing import Any, ClassVar

from django.utils import timezone
from rest_framework import exceptions
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from connectors.models import ApiKey


class BearerKey(BaseAuthentication):
    """`Authorization: Bearer <key>`. Sets `request.auth` to the ApiKey."""

    header: ClassVar[str] = "Authorization"
    keyword: ClassVar[str] = "Bearer"

    def secret(self, request: Request) -> str:
        """The key that the request carries; "" when it carries none."""
        value = request.headers.get(self.header, "").strip()
        if not self.keyword:
            return value
        scheme, _, secret = value.partition(" ")
        return secret.strip() if scheme.lower() == self.keyword.lower() else ""

    def authenticate(self, request: Request) -> tuple[Any, ApiKey]:
        secret = self.secret(request)
        key = ApiKey.find(secret, now=timezone.now())
        if key is None:
            raise exceptions.NotAuthenticated(
                f"The API key in the {self.header} header is not valid."
                if secret
                else f"Send an API key in the {self.header} header."
            )
        return None, key

    def authenticate_header(self, request: Request) -> str:
        return self.keyword or self.header
