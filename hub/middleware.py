"""A request id on every answer, and Django's middleware for people kept to the pages that people use."""

import re
from collections.abc import Callable
from typing import Any

from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.messages.middleware import MessageMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.http.response import HttpResponseBase
from django.middleware.common import CommonMiddleware
from django.middleware.csrf import CsrfViewMiddleware
from whitenoise.middleware import WhiteNoiseMiddleware

from customers.ids import new_public_id

# Sessions, log-in, CSRF and messages are for these paths only.
PEOPLE = ("/admin", "/static/")
WELL_FORMED = re.compile(r"[A-Za-z0-9_.:-]{8,64}")


class RequestIdMiddleware:
    """Sets `request.request_id` and answers it as `Request-Id`; a caller's own is kept when it is well formed."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        given = request.headers.get("Request-Id", "")
        request_id = given if WELL_FORMED.fullmatch(given) else new_public_id("req")
        request.request_id = request_id  # type: ignore[attr-defined] # the attribute that this class adds
        response = self.get_response(request)
        response["Request-Id"] = request_id
        # With its length an answer goes out in one piece; Django says it in CommonMiddleware, which is for people here.
        if isinstance(response, HttpResponse) and response.status_code not in (204, 304):
            response.setdefault("Content-Length", str(len(response.content)))
        return response


class AdminAddressMiddleware:
    """Refuses NUL in the query of an admin page: no value has one, and PostgreSQL refuses to look for it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if request.path_info.startswith("/admin") and "%00" in request.META.get("QUERY_STRING", ""):
            return HttpResponseBadRequest("The address holds a NUL character.")
        return self.get_response(request)


def for_people(middleware: type[Any]) -> type[Any]:
    """The same middleware, passed by on every path but the admin's and its files'."""
    apply = middleware.__call__

    def call(self: Any, request: HttpRequest) -> HttpResponseBase:
        for_a_person = request.path_info.startswith(PEOPLE)
        response: HttpResponseBase = apply(self, request) if for_a_person else self.get_response(request)
        return response

    return type(middleware.__name__, (middleware,), {"__call__": call})


AdminStaticMiddleware = for_people(WhiteNoiseMiddleware)
AdminSessionMiddleware = for_people(SessionMiddleware)
AdminCommonMiddleware = for_people(CommonMiddleware)
AdminCsrfMiddleware = for_people(CsrfViewMiddleware)
AdminAuthenticationMiddleware = for_people(AuthenticationMiddleware)
AdminMessageMiddleware = for_people(MessageMiddleware)
