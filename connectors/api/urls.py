"""Every address of the hub's own endpoints."""

from django.urls import URLPattern

from connectors.api import changes, connections, customers, links, runs

urls: tuple[URLPattern, ...] = (
    *customers.urls,
    *links.urls,
    *connections.urls,
    *runs.urls,
    *changes.urls,
)
