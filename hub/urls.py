"""Every address of the hub: the admin, the probes, and the endpoints that each provider mirrors."""

from django.contrib import admin
from django.urls import path

from connectors.api.reference import urls as reference_urls
from connectors.api.urls import urls as own_urls
from connectors.providers import PROVIDERS
from hub import probes

urlpatterns = [
    path("", probes.front_door),
    path("admin/", admin.site.urls),
    path("livez", probes.live),
    path("readyz", probes.ready),
    *reference_urls,
    # Before the mirrored ones: on the addresses of Links they answer more methods.
    *own_urls,
    *(url for provider in PROVIDERS.values() for url in provider.urls),
]
handler404 = "hub.probes.not_found"
handler500 = "hub.probes.failed"
