"""A `ModelViewSet` over the hub's customers as Django REST framework comes: its settings, middleware and renderers.

It checks the key; it writes no change row and marks no link.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.benchmarks.peers.drf_settings"

from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()

from django.urls import re_path  # noqa: E402 # models need a Django that is set up
from django.utils import timezone  # noqa: E402 # as above
from rest_framework import authentication, exceptions, pagination, serializers, viewsets  # noqa: E402 # as above

from connectors.models import ApiKey  # noqa: E402 # as above
from customers.ids import parse_public_id, uuid7  # noqa: E402 # as above
from customers.models import Customer  # noqa: E402 # as above


class Key(authentication.BaseAuthentication):
    def authenticate(self, request: Any) -> Any:
        secret = request.headers.get("Authorization", "").partition(" ")[2]
        key = ApiKey.objects.select_related("organization").filter(hash=hashlib.sha256(secret.encode()).hexdigest())
        if (found := key.first()) is None:
            raise exceptions.AuthenticationFailed
        return None, found


class Shown(serializers.ModelSerializer[Customer]):
    class Meta:
        model = Customer
        fields = "__all__"
        read_only_fields = ("organization",)


class Pages(pagination.CursorPagination):
    page_size = 100
    ordering = "id"


class Customers(viewsets.ModelViewSet[Customer]):
    authentication_classes = [Key]
    serializer_class = Shown
    pagination_class = Pages

    def get_queryset(self) -> Any:
        return Customer.objects.filter(organization=self.request.auth.organization)  # type: ignore[union-attr] # `Key` lets nobody in without one

    def get_object(self) -> Customer:
        found: Customer = self.get_queryset().get(pk=parse_public_id("cust", self.kwargs["pk"]))
        return found

    def perform_create(self, serializer: Any) -> None:
        now = timezone.now()
        organization = self.request.auth.organization  # type: ignore[union-attr] # `Key` lets nobody in without one
        serializer.save(id=uuid7(), organization=organization, created_at=now, updated_at=now)


urlpatterns = [
    re_path(r"^api/v1/unified/customer$", Customers.as_view({"post": "create"})),
    re_path(
        r"^api/v1/unified/customer/(?P<pk>[^/]+)$", Customers.as_view({"get": "retrieve", "patch": "partial_update"})
    ),
    re_path(r"^api/v1/unified/customers$", Customers.as_view({"get": "list"})),
]
