"""The viewset that each provider's documented endpoints are built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rest_framework import exceptions, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.viewsets import ViewSet

from connectors.inbound.authentication import BearerKey
from connectors.inbound.bodies import AlwaysJSON, JSONParser, measure
from connectors.inbound.errors import Fault, fault_of
from connectors.models import ApiKey, Connection
from customers.editing import Actor
from customers.models import CustomerChange, Organization


class Mirror(ViewSet):
    """A viewset of one provider's documented endpoints. A subclass sets `provider` and says how an error looks."""

    provider: ClassVar[str]
    authentication_classes = [BearerKey]
    permission_classes = []
    parser_classes = [JSONParser]
    content_negotiation_class = AlwaysJSON

    def fault(self, fault: Fault) -> Mapping[str, Any]:
        """The error body in the provider's documented shape."""
        raise NotImplementedError

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        scope = "customers:read" if request.method in ("GET", "HEAD", "OPTIONS") else "customers:write"
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
        if request.method in ("POST", "PUT"):
            measure(request)

    def handle_exception(self, exc: Exception) -> Response:
        fault = fault_of(exc)
        response = Response(self.fault(fault), status=fault.status)
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
        return Connection.objects.filter(
            organization=self.organization,
            provider=self.provider,
            account=account,
            direction=Connection.Direction.CALLS_US,
        ).first()


def read_query(serializer: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    """The query string as the serializer reads it. Raises ValidationError."""
    reader = serializer(data=request.query_params.dict())
    reader.is_valid(raise_exception=True)
    values: dict[str, Any] = reader.validated_data
    return values
