"""The screens of connected systems, and the customer screens with what each system knows."""

from connectors.admin import connections, customers, dashboard, issues, keys, links, runs

__all__ = ["connections", "customers", "dashboard", "issues", "keys", "links", "runs"]
