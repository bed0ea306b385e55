"""The viewset that each provider's documented endpoints are built on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

from django.db import models
from django.http import HttpRequest, HttpResponse
from rest_framework import exceptions, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.viewsets import ViewSet

from connectors.inbound import idempotency, throttling
from connectors.inbound.authentication import BearerKey
from connectors.inbound.bodies import AlwaysJSON, JSONParser, measure
from connectors.inbound.errors import Fault, fault_of
from connectors.models import ApiKey, Connection
from customers.editing import Actor
from customers.models import CustomerChange, Organization
from customers.prepared import Param, Prepared


class Mirror(ViewSet):
    """A viewset of one provider's documented endpoints. A subclass sets `provider` and says how an error looks.

    With an Idempotency-Key an action is one transaction, so it must not wait for others or call them. One that has to
    sets `afterwards`: it is called when all is committed and gives the answer in place of the action's own, which is
    the one that is kept for the key.
    """

    provider: ClassVar[str]
    # The headers that make a request with the same address and body another one.
    telling_headers: ClassVar[tuple[str, ...]] = ("If-Match",)
    quota: throttling.Quota | None = None
    afterwards: Callable[[], Response] | None = None
    authentication_classes = [BearerKey]
    permission_classes = []
    parser_classes = [JSONParser]
    content_negotiation_class = AlwaysJSON

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        """The error body in the provider's documented shape."""
        raise NotImplementedError

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        """As DRF's; a request with an Idempotency-Key is carried out once, and every answer tells the key's quota."""
        self.args, self.kwargs = args, kwargs
        self.request = self.initialize_request(request, *args, **kwargs)
        response: HttpResponse
        try:
            self.initial(self.request, *args, **kwargs)
            key = idempotency.key_of(self.request, api_key=self.key)
            if key is None:
                response = self.act()
            else:
                response = idempotency.once(
                    request=self.request,
                    key=key,
                    api_key=self.key,
                    telling=self.telling_headers,
                    act=self.act,
                    refuse=self.refused,
                )
            if self.afterwards is not None and response.status_code < 400:
                response = self.finished(self.afterwards())
        except Exception as error:
            response = self.refused(error)
        if self.quota is not None:
            for name, value in self.quota.headers.items():
                response[name] = value
        return response

    def act(self) -> Response:
        """Do what the request asks for."""
        method = (self.request.method or "").lower()
        handler = getattr(self, method, None) if method in self.http_method_names else None
        return self.finished((handler or self.http_method_not_allowed)(self.request, *self.args, **self.kwargs))

    def refused(self, error: Exception) -> Response:
        return self.finished(self.handle_exception(error))

    def finished(self, response: Response) -> Response:
        self.headers = self.default_response_headers
        finished: Response = self.finalize_response(self.request, response, *self.args, **self.kwargs)
        return finished

    def check_throttles(self, request: Request) -> None:
        self.quota = throttling.take(self.key, at=self.key.asked_at)
        if self.quota is not None and self.quota.wait is not None:
            raise exceptions.Throttled(self.quota.wait)

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        scope = self.scope(request)
        if scope not in self.key.scopes:
            raise exceptions.PermissionDenied(f"This API key lacks the scope {scope}.")
        given = (
            *map(str, kwargs.values()),
            *(v for k in request.query_params for v in (k, *request.query_params.getlist(k))),
        )
        if any("\x00" in text for text in given):
            raise exceptions.ParseError("Remove the NUL character from the address.")
        # Answers name this host: one that is not ours is refused before anything is stored, not after.
        request.get_host()
        if request.method in ("POST", "PUT", "PATCH"):
            measure(request)

    def scope(self, request: Request) -> str:
        """What the key must be allowed."""
        return "customers:read" if request.method in ("GET", "HEAD", "OPTIONS") else "customers:write"

    def handle_exception(self, exc: Exception) -> Response:
        fault = fault_of(exc)
        response = Response(self.fault(fault), status=fault.status, headers=dict(fault.headers))
        if fault.status == status.HTTP_401_UNAUTHORIZED:
            response["WWW-Authenticate"] = self.get_authenticate_header(self.request)
        response.exception = True
        return response

    @property
    def key(self) -> ApiKey:
        key = self.request.auth
        if not isinstance(key, ApiKey):
            raise exceptions.NotAuthenticated
        return key

    @property
    def organization(self) -> Organization:
        return self.key.organization

    @property
    def actor(self) -> Actor:
        return Actor(
            kind=CustomerChange.Actor.API_KEY,
            id=str(self.key.pk),
            name=self.key.name,
            request_id=getattr(self.request, "request_id", ""),
        )

    def find_connection(self, account: str) -> Connection | None:
        """The connection that an account id in the request names, inside the key's organization and never beyond it."""
        for connection in _CONNECTION(organization=self.key.organization_id, provider=self.provider, account=account):
            return connection
        return None


_CONNECTION = Prepared(
    lambda: Connection.objects.filter(
        organization_id=Param("organization", models.BigAutoField()),
        provider=Param("provider", models.CharField()),
        account=Param("account", models.CharField()),
        direction=Connection.Direction.CALLS_US,
    ).order_by(),
    by_key=True,
)


@cache
def reader(serializer: type[serializers.Serializer[Any]]) -> serializers.Serializer[Any]:
    """The one serializer of this class: making its fields costs more than reading, which leaves no trace in it."""
    return serializer()


def read_query(serializer: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    """The query string as the serializer reads it. Raises ValidationError."""
    values: dict[str, Any] = reader(serializer).run_validation(request.query_params.dict())
    return values
