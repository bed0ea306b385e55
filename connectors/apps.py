from django.apps import AppConfig
from django.db.models.signals import post_migrate


class ConnectorsConfig(AppConfig):
    name = "connectors"
    verbose_name = "Connected systems"

    def ready(self) -> None:
        from connectors.groups import make_groups
        from connectors.providers import PROVIDERS
        from connectors.sync.dirty import mark_dirty
        from connectors.sync.merging import move_links
        from customers.editing import customers_changed

        def changed(**signal: object) -> None:
            move_links(
                changes=signal["changes"],  # type: ignore[arg-type] # a Signal carries no types
                at=signal["at"],  # type: ignore[arg-type] # as above
            )
            mark_dirty(
                organization=signal["organization"],  # type: ignore[arg-type] # as above
                changes=signal["changes"],  # type: ignore[arg-type] # as above
                actor=signal["actor"],  # type: ignore[arg-type] # as above
                at=signal["at"],  # type: ignore[arg-type] # as above
                mapped={slug: provider.fields for slug, provider in PROVIDERS.items()},
            )

        customers_changed.connect(changed, weak=False, dispatch_uid="connectors")

        def migrated(using: str, **signal: object) -> None:
            make_groups(using=using)

        # Rights are made by the same signal, whose receiver came before this one.
        post_migrate.connect(migrated, sender=self, weak=False, dispatch_uid="connectors.groups")
