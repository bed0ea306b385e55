"""API keys in the headers that the mirrored APIs document."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

from django.db.models import Q
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
        now = timezone.now()
        secret = self.secret(request)
        key = ApiKey.find(secret, now=now)
        if key is None:
            raise exceptions.NotAuthenticated(
                f"The API key in the {self.header} header is not valid."
                if secret
                else f"Send an API key in the {self.header} header."
            )
        if key.last_used_at is None or now - key.last_used_at > timedelta(minutes=1):
            stale = Q(last_used_at=None) | Q(last_used_at__lt=now - timedelta(minutes=1))
            ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=now)
        return None, key

    def authenticate_header(self, request: Request) -> str:
        return self.keyword or self.header
