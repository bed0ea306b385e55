from django.apps import AppConfig
from django.db.models.signals import post_migrate


class CustomersConfig(AppConfig):
    name = "customers"
    verbose_name = "Customers"

    def ready(self) -> None:
        from django.db import connections

        from customers import search

        def migrated(using: str, **signal: object) -> None:
            if connections[using].vendor == "sqlite":
                search.prepare(connections[using])

        post_migrate.connect(migrated, sender=self, weak=False, dispatch_uid="customers.search")
