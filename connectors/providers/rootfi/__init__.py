"""RootFi v3, ecommerce customers: the endpoints that others call here, and the client for those elsewhere.

Documentation: https://docs.integrationlabs.co/api-reference/v3/ecommerce/customers/create-customers
(and get-all-customers, core/sync/sync-data, core/sync/get-all-sync).
"""

from connectors.providers.rootfi.client import RootFi

__all__ = ["RootFi"]
