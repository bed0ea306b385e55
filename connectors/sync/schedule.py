"""When a connection is pulled next: by its schedule, else by its interval."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta

from croniter import CroniterBadCronError, CroniterBadDateError, CroniterError, croniter
from django.utils import timezone

from connectors.models import Connection

logger = logging.getLogger(__name__)

EXAMPLE = "such as 30 2 * * 0 for Sundays at 02:30"


def next_pull(connection: Connection, *, after: datetime) -> datetime | None:
    """The first time after `after` at which the connection is to be pulled; None when only a person pulls it.

    A schedule is read on the clocks of `settings.TIME_ZONE`. What falls into the hour that they skip in spring comes
    when they have skipped it; what falls into the hour that they repeat in autumn comes once, except where the hour is
    left open (`*`): such a schedule goes by the time that passes. A schedule that cannot be read counts as none.
    """
    if connection.pull_cron:
        try:
            return _next(connection.pull_cron, after)
        except CroniterError as error:
            logger.warning("connection %s has a schedule that cannot be read: %s", connection.pk, error)
    if connection.pull_interval:
        return after + timedelta(seconds=connection.pull_interval)
    return None


def _next(text: str, after: datetime) -> datetime:
    columns = text.split()
    if len(columns) != 5:
        raise CroniterBadCronError(f"[{text}] has {len(columns)} parts instead of five")
    zone = timezone.get_default_timezone()
    times = croniter(text, after.astimezone(zone))
    by_the_clock = not columns[1].startswith(("*", "?"))
    while True:
        moment: datetime = times.get_next(datetime).astimezone(zone)
        if not (by_the_clock and moment.fold):
            return moment.astimezone(UTC)


def problems_of_cron(text: str) -> str:
    """What is wrong with a schedule and how to put it right, in one sentence; "" when it can be used."""
    columns = text.split()
    if len(columns) > 5:
        return f"Leave out the seconds: a schedule has five parts, minute to weekday, {EXAMPLE}."
    if len(columns) != 5:
        return f"Write five parts, minute, hour, day, month and weekday, {EXAMPLE}."
    if re.search(r"\b[hr]\b", text, re.IGNORECASE):
        return f"Write out when it is to run: H and R leave it to chance; {EXAMPLE}."
    try:
        _next(text, timezone.now())
    except CroniterBadDateError:
        return "Choose days that there are: this schedule never comes, as the 30th of February never does."
    except CroniterError as error:
        return f"This cannot be read as a schedule ({str(error)[:100]}): write five parts, {EXAMPLE}."
    return ""
