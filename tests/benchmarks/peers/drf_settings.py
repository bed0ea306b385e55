"""The settings of a new Django project, with the hub's models and database."""

from hub.settings import *  # noqa: F403 # what is not named below
from hub.settings import DATABASES

ROOT_URLCONF = "tests.benchmarks.peers.drf"
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
REST_FRAMEWORK: dict[str, object] = {}
DATABASES["default"].pop("OPTIONS", None)
DATABASES["default"].pop("CONN_MAX_AGE", None)
