"""A request id on every answer, and Django's middleware for people kept to the pages that people use."""

import re
from collections.abc import Callable

from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.messages.middleware import MessageMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.middleware.common import CommonMiddleware
from django.middleware.csrf import CsrfViewMiddleware
from whitenoise.middleware import WhiteNoiseMiddleware

from customers.ids import new_public_id

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
        return response


class ForPeople:
    """Mixed into a Django middleware: paths outside the admin pass it by."""

    get_response: Callable[[HttpRequest], HttpResponseBase]

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if request.path_info.startswith(("/admin", "/static/")):
            return super().__call__(request)  # type: ignore[misc, no-any-return] # the middleware it is mixed into
        return self.get_response(request)

    def process_view(self, request: HttpRequest, *args: object) -> HttpResponseBase | None:
        inherited = getattr(super(), "process_view", None)
        if inherited is None or not request.path_info.startswith("/admin"):
            return None
        return inherited(request, *args)  # type: ignore[no-any-return] # as above


class AdminStaticMiddleware(ForPeople, WhiteNoiseMiddleware):
    pass


class AdminSessionMiddleware(ForPeople, SessionMiddleware):
    pass


class AdminCommonMiddleware(ForPeople, CommonMiddleware):
    pass


class AdminCsrfMiddleware(ForPeople, CsrfViewMiddleware):
    pass


class AdminAuthenticationMiddleware(ForPeople, AuthenticationMiddleware):
    pass


class AdminMessageMiddleware(ForPeople, MessageMiddleware):
    pass
