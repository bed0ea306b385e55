"""Every address of the hub: the admin, the probes, and the endpoints that each provider mirrors."""

from django.contrib import admin
from django.urls import path

from connectors.providers import PROVIDERS
from hub import probes

urlpatterns = [
    path("", probes.front_door),
    path("admin/", admin.site.urls),
    path("livez", probes.live),
    path("readyz", probes.ready),
    *(url for provider in PROVIDERS.values() for url in provider.urls),
]
handler404 = "hub.probes.not_found"
handler500 = "hub.probes.failed"
