"""The written-down list of providers. Adding one: write its module (or folder) and add one line here."""

from connectors.provider import Provider
from connectors.providers.cheqpay import Cheqpay
from connectors.providers.commenda import Commenda
from connectors.providers.links import Links
from connectors.providers.rootfi import RootFi

PROVIDERS: dict[str, Provider] = {
    provider.slug: provider
    for provider in (
        Links(),
        Commenda(),
        Cheqpay(),
        RootFi(),
    )
}
