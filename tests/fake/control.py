"""How a test speaks to the fake provider: the same calls whether it runs in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tests.fake.judge import Judge


class Controls(Protocol):
    """What both ways of running the provider offer."""

    url: str

    def configure(self, name: str, **settings: Any) -> dict[str, Any]: ...

    def control(self, name: str, verb: str, **given: Any) -> Any: ...

    def rows(self) -> Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]:
        """A way to query the provider's tables, with everything that happened so far in them."""
        ...


class Account:
    """One account at the fake provider. `settings` are those of tests.fake.system.Settings."""

    def __init__(self, controls: Controls, name: str, settings: dict[str, Any]) -> None:
        self.controls = controls
        self.name = name
        self.settings = controls.configure(name, **settings)

    @property
    def url(self) -> str:
        """A connection's base_url."""
        return f"{self.controls.url}/a/{self.name}"

    def set(self, **settings: Any) -> None:
        self.settings = self.controls.configure(self.name, **settings)

    def options(self) -> dict[str, Any]:
        """The options of a connection that knows what this account really offers."""
        return {"capabilities": self.settings["capabilities"], "normaliser": self.settings["normaliser"]}

    def script(
        self, fault: str, *, times: int = 1, skip: int = 0, method: str = "", path: str = "", **more: Any
    ) -> int:
        """The next `times` requests that match fail so, after `skip` that do not. More: retry_after, delay, pause."""
        one = {"fault": fault, "times": times, "skip": skip, "method": method, "path": path, **more}
        return int(self._do("script", faults=[one]))

    # People at the provider

    def create(self, *, marker: str | None = None, **fields: Any) -> str:
        return str(self._do("create", fields=fields, marker=marker))

    def edit(self, record: str, **fields: Any) -> None:
        self._do("edit", record=record, fields=fields)

    def delete(self, record: str) -> None:
        self._do("delete", record=record)

    def undelete(self, record: str) -> None:
        self._do("undelete", record=record)

    def merge(self, *, winner: str, loser: str) -> None:
        self._do("merge", winner=winner, loser=loser)

    def hide(self, share: float) -> int:
        return int(self._do("hide", share=share))

    def show(self) -> None:
        self._do("show")

    def login(self) -> dict[str, Any]:
        """A fresh pair of tokens, as after a person's log-in. Only with auth="oauth" does anybody ask for them."""
        return dict(self._do("login"))

    def credentials(self) -> dict[str, str]:
        """A person's log-in as a connection keeps it, ready for Connection.seal_credentials."""
        pair = self.login()
        return {
            "token_url": f"{self.url}/token",
            "access_token": pair["access_token"],
            "refresh_token": pair["refresh_token"],
        }

    def revoke(self, kind: str = "") -> None:
        self._do("revoke", kind=kind)

    # Time and evidence

    def advance(self, seconds: float) -> None:
        """Move this account's clock; what is due by then is applied."""
        self._do("advance", seconds=seconds)

    def waiting(self) -> int:
        """How many late requests are still to be applied."""
        return int(self._do("waiting"))

    def ledger(self, *, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Requests as they came, oldest first. For many, ask the judge."""
        return list(self._do("ledger", after=after, limit=limit))

    def writes(self, *, after: int = 0, limit: int = 1000) -> list[dict[str, Any]]:
        """Writes as they were applied, oldest first."""
        return list(self._do("writes", after=after, limit=limit))

    def records(self, *, marker: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
        return list(self._do("records", limit=limit, **({"marker": marker} if marker is not None else {})))

    def judge(self) -> Judge:
        self._do("flush")
        return Judge(self.controls.rows(), self.name)

    def _do(self, verb: str, **given: Any) -> Any:
        return self.controls.control(self.name, verb, **given)
