"""Nobody's change is lost: sixteen clients read, add one, and write with If-Match, at the running server.

A commit makes 1,000 attempts, `HUB_FULL=1` makes 10,000.
"""

import os
import threading
from collections import Counter

import httpx2
import pytest

from connectors.models import ApiKey
from customers import editing
from customers.editing import Actor
from customers.models import Customer, CustomerChange, Organization

ATTEMPTS = 10_000 if os.environ.get("HUB_FULL") else 1_000
CLIENTS = 16


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_every_increment_that_was_accepted_is_there(
    server: str, organization: Organization, api_key: str, method: str
) -> None:
    ApiKey.objects.update(rate=0)
    values = {"name": "Counter", "email": "counter@example.com", "address_line1": "0"}
    [customer] = editing.create(organization=organization, values=[values], actor=Actor(kind="user", name="Tester"))
    path = f"/api/v1/unified/customer/{customer.public_id}"
    attempts = iter(range(ATTEMPTS // 2))
    statuses: Counter[int] = Counter()
    failures: list[BaseException] = []
    lock = threading.Lock()

    def work() -> None:
        try:
            with httpx2.Client(
                base_url=server, headers={"Authorization": f"Bearer {api_key}"}, timeout=60, trust_env=False
            ) as client:
                while True:
                    with lock:
                        if next(attempts, None) is None:
                            return
                    read = client.get(path).raise_for_status()
                    data = read.json()["data"]
                    change = {"address_line1": str(int(data["address_line1"]) + 1)}
                    body = change if method == "PATCH" else {**data, **change}
                    answer = client.request(method, path, json=body, headers={"If-Match": read.headers["ETag"]})
                    with lock:
                        statuses[answer.status_code] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert statuses.keys() == {200, 412}, "they did get in each other's way, and in no other way"
    stored = Customer.objects.get()
    assert int(stored.address_line1) == statuses[200]
    assert stored.version == 1 + statuses[200]
    assert CustomerChange.objects.count() == stored.version
    assert statuses.total() == ATTEMPTS // 2
