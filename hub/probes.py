"""What load balancers ask, and the answers to addresses that no room of the hub serves."""

from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse


def front_door(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/admin/")


def live(request: HttpRequest) -> HttpResponse:
    """200 while the process answers; asks nothing of the database."""
    return JsonResponse({"status": "live"})


def ready(request: HttpRequest) -> HttpResponse:
    """200 when the database answers and has every migration; else 503 with the reason in words."""
    try:
        executor = MigrationExecutor(connection)
        missing = len(executor.migration_plan(executor.loader.graph.leaf_nodes()))
    except Exception:  # whatever the driver raises, the answer is the same and reveals nothing
        return JsonResponse({"status": "not ready", "reason": "the database does not answer"}, status=503)
    if missing:
        reason = f"{missing} migrations are missing: run manage.py migrate"
        return JsonResponse({"status": "not ready", "reason": reason}, status=503)
    return JsonResponse({"status": "ready"})


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return JsonResponse({"message": "No such address. Check the path against the API's documentation."}, status=404)


def failed(request: HttpRequest) -> HttpResponse:
    return JsonResponse(
        {"message": "Something went wrong in the hub. Quote the Request-Id header of this answer."}, status=500
    )
