"""The hub as its own provider: a client's request goes through the whole WSGI application, in this process."""

import httpx2
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections


class Loopback(httpx2.WSGITransport):
    def __init__(self) -> None:
        super().__init__(app=get_wsgi_application())

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        # The ends of a request close the database connection, and with it the transaction of the test.
        for signal in (request_started, request_finished):
            signal.disconnect(close_old_connections)
        try:
            answered = super().handle_request(request)
            content = answered.read()
        finally:
            for signal in (request_started, request_finished):
                signal.connect(close_old_connections)
        return httpx2.Response(answered.status_code, headers=answered.headers, content=content)


def client() -> httpx2.Client:
    return httpx2.Client(transport=Loopback())
