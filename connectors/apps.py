from django.apps import AppConfig


class ConnectorsConfig(AppConfig):
    name = "connectors"
    verbose_name = "Connected systems"

    def ready(self) -> None:
        from connectors.providers import PROVIDERS
        from connectors.sync.dirty import mark_dirty
        from customers.editing import customers_changed

        mapped = {slug: provider.fields for slug, provider in PROVIDERS.items()}

        def changed(**signal: object) -> None:
            mark_dirty(
                organization=signal["organization"],  # type: ignore[arg-type] # a Signal carries no types
                changes=signal["changes"],  # type: ignore[arg-type] # as above
                actor=signal["actor"],  # type: ignore[arg-type] # as above
                mapped=mapped,
            )

        customers_changed.connect(changed, weak=False, dispatch_uid="connectors")
