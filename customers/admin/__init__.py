"""The admin of the golden record: customers, what happened to them, and the people who work with them."""

from customers.admin import customers, logs, people

__all__ = ["customers", "logs", "people"]
