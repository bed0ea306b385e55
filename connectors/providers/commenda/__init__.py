"""Commenda, the customers of a corporation in its Global Indirect Tax API.

Documentation: https://docs.commenda.io/engine/indirect-tax/customers/customers-POST (and customers-GET,
customers-id-GET, customers-id-POST, customers-id-DELETE). For callers of the hub `id` is the link's `uid` and
`external_id` its `remote_id`.
"""

from connectors.providers.commenda.client import Commenda

__all__ = ["Commenda"]
