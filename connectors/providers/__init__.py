"""The written-down list of providers. Adding one: write its module (or folder) and add one line here."""

from connectors.provider import Provider
from connectors.providers.links import Links

PROVIDERS: dict[str, Provider] = {
    provider.slug: provider
    for provider in (
        Links(),
    )
}
