"""Every setting, from the environment; each has a default that works on a laptop.

`PRODUCTION=true` turns the defaults that are only safe on a laptop into errors at start-up. The README lists the
variables.
"""

import ipaddress
import os
import secrets
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import environ
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from django.urls import reverse_lazy

BASE_DIR = Path(__file__).resolve().parent.parent
env = environ.Env()
env.read_env(str(BASE_DIR / ".env"))

PRODUCTION: bool = env.bool("PRODUCTION", default=False)
DEBUG: bool = env.bool("DEBUG", default=False)
# Where SQLite, the keys of a laptop and what the quickstart made are kept; `hub.env` there is read, too.
DATA_DIR = Path(env.str("HUB_DATA", default=str(BASE_DIR / "data"))).expanduser().resolve()
env.read_env(str(DATA_DIR / "hub.env"))


def kept_secret(name: str) -> str:
    """A random key made on first use and kept in DATA_DIR, so that no laptop runs on a key that is in the source."""
    path = DATA_DIR / name
    if not path.exists():
        DATA_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = DATA_DIR / f".{name}.{os.getpid()}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(urlsafe_b64encode(secrets.token_bytes(32)).decode())
        try:
            os.link(fresh, path)  # atomic: of two processes that start at once, one key is kept
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return path.read_text().strip()


SECRET_KEY: str = env.str("SECRET_KEY", default="") or ("" if PRODUCTION else kept_secret("secret_key"))
# Keys for connection credentials at rest: the first encrypts, all decrypt. 32 random bytes each, base64url.
SEALING_KEYS: list[str] = env.list("SEALING_KEYS", default=[]) or ([] if PRODUCTION else [kept_secret("sealing_key")])
ALLOWED_HOSTS: list[str] = env.list("ALLOWED_HOSTS", default=[] if PRODUCTION else ["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS: list[str] = env.list("CSRF_TRUSTED_ORIGINS", default=[])

DATABASES: dict[str, dict[str, Any]] = {
    "default": env.db("DATABASE_URL", default=f"sqlite:///{DATA_DIR / 'hub.sqlite3'}")
}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["CONN_MAX_AGE"] = None
    # A file, as in real use: threads and a live server then share it the way they do outside the tests.
    DATABASES["default"]["TEST"] = {"NAME": str(DATA_DIR / f"test-{os.getpid()}.sqlite3")}
    DATABASES["default"]["OPTIONS"] = {
        # IMMEDIATE takes the write lock at BEGIN: a read that turns into a write can then never fail with "locked".
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        # FULL: what is committed before a call leaves must outlive a power cut.
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;",
    }
else:
    # A connection per request costs PostgreSQL more than the request itself; the pool removes it.
    DATABASES["default"]["ENGINE"] = "hub.postgresql"
    DATABASES["default"]["OPTIONS"] = {
        "pool": {
            "min_size": env.int("DATABASE_POOL_MIN", default=1),
            "max_size": env.int("DATABASE_POOL_MAX", default=16),
            "timeout": 20,
        },
        # What `customers.prepared` looks up by a key is parsed and planned once on each connection. Off for a pooler
        # that gives every transaction another connection and cannot follow that.
        "prepare_threshold": 0 if env.bool("DATABASE_PREPARED", default=True) else None,
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "customers",
    "connectors",
]
# Sessions, CSRF, log-in and messages are for people in the admin; the API paths carry none of them.
MIDDLEWARE = [
    "hub.middleware.RequestIdMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "hub.middleware.AdminStaticMiddleware",
    "hub.middleware.AdminAddressMiddleware",
    "hub.middleware.AdminSessionMiddleware",
    "hub.middleware.AdminCommonMiddleware",
    "hub.middleware.AdminCsrfMiddleware",
    "hub.middleware.AdminAuthenticationMiddleware",
    "hub.middleware.AdminMessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
# W003 looks for CsrfViewMiddleware by its own name; AdminCsrfMiddleware above is it.
SILENCED_SYSTEM_CHECKS = ["security.W003"]
ROOT_URLCONF = "hub.urls"
WSGI_APPLICATION = "hub.wsgi.application"
APPEND_SLASH = False
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# Bodies over this many bytes are refused before they are read.
DATA_UPLOAD_MAX_MEMORY_SIZE = 1024 * 1024
DATA_UPLOAD_MAX_NUMBER_FIELDS = 20_000

REST_FRAMEWORK: dict[str, Any] = {
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": [],
    "DEFAULT_RENDERER_CLASSES": ["connectors.inbound.bodies.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["connectors.inbound.bodies.JSONParser"],
    "UNAUTHENTICATED_USER": None,
    "UNAUTHENTICATED_TOKEN": None,
    "DEFAULT_SCHEMA_CLASS": "connectors.api.schema.Described",
}
SPECTACULAR_SETTINGS: dict[str, Any] = {
    "OAS_VERSION": "3.1.1",
    "TITLE": "Customer Hub",
    "VERSION": "1",
    "DESCRIPTION": "One golden record per customer, one link record for every system that knows that customer. "
    "Links, Commenda, Cheqpay and RootFi are served as their own documents describe them; what goes beyond is under "
    "Customer Hub.",
    "SERVERS": [{"url": "/", "description": "This hub"}],
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
    "PREPROCESSING_HOOKS": ["connectors.api.schema.addresses"],
    "POSTPROCESSING_HOOKS": ["connectors.api.reference.finish"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]

LANGUAGE_CODE = "en"
# What there are words for. Django's own hundred languages would be looked up for each page of the admin.
LANGUAGES = [("en", "English")]
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = True
STATIC_URL = "static/"
# WhiteNoise serves the admin's files from the installed packages: there is nothing to collect before the first start.
# Set STATIC_ROOT and run collectstatic to let a proxy serve them instead.
STATIC_ROOT: str | None = env.str("STATIC_ROOT", default="") or None
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

# Outgoing calls go to public https addresses unless the operator lists a network here (CIDR) or allows http.
ALLOWED_PRIVATE_NETWORKS: list[str] = env.list("ALLOWED_PRIVATE_NETWORKS", default=[])
ALLOW_HTTP_TARGETS: bool = env.bool("ALLOW_HTTP_TARGETS", default=False)
ALLOWED_TARGET_PORTS: list[int] = env.list("ALLOWED_TARGET_PORTS", cast=int, default=[443, 8443])

# How many requests a second an API key without a limit of its own may make; two seconds' worth at once. 0: no limit.
API_RATE: float = env.float("API_RATE", default=100.0)

# An edit waits this long before it is pushed, so that typing does not become ten pushes. "Push now" does not wait.
PUSH_DEBOUNCE_SECONDS: float = env.float("PUSH_DEBOUNCE_SECONDS", default=2.0)

# How many calls a worker has under way at one connection. More than 8 help where an account allows more than some
# hundred calls a second, or takes seconds to answer.
PUSH_CONCURRENT_CALLS: int = env.int("PUSH_CONCURRENT_CALLS", default=8)

# Where Celery's messages go, such as redis://127.0.0.1:6379/0. Empty: work is carried by `manage.py run_worker` alone.
CELERY_BROKER_URL: str = env.str("CELERY_BROKER_URL", default="")

SESSION_COOKIE_AGE = 12 * 60 * 60
SESSION_COOKIE_HTTPONLY = True
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
if PRODUCTION:
    SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
    SECURE_SSL_REDIRECT = env.bool("SECURE_SSL_REDIRECT", default=True)
    # Load balancers ask these over plain HTTP.
    SECURE_REDIRECT_EXEMPT = [r"^livez$", r"^readyz$"]
    SECURE_HSTS_SECONDS = env.int("SECURE_HSTS_SECONDS", default=31_536_000)
    SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = True
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["stderr"], "level": env.str("LOG_LEVEL", default="WARNING")},
}


def sidebar(title: str, icon: str, page: str, *rights: str) -> dict[str, Any]:
    """A line of the side bar, for those with one of the rights; without any, for superusers."""
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{page}"),
        "permission": lambda request: request.user.is_superuser or any(map(request.user.has_perm, rights)),
    }


UNFOLD = {
    "SITE_TITLE": "Customer Hub",
    "SITE_HEADER": "Customer Hub",
    "SITE_SYMBOL": "hub",
    "SHOW_HISTORY": False,
    "SHOW_VIEW_ON_SITE": False,
    "STYLES": [lambda request: static("connectors/admin.css")],
    "DASHBOARD_CALLBACK": "connectors.admin.dashboard.dashboard",
    "SIDEBAR": {
        "navigation": [
            {
                "title": "Work",
                "items": [
                    {"title": "Dashboard", "icon": "dashboard", "link": reverse_lazy("admin:index")},
                    sidebar(
                        *("Needs you", "inbox", "connectors_customerlink_needs_you", "connectors.view_customerlink"),
                        *("connectors.change_connection", "connectors.change_issue"),
                    ),
                    sidebar("Customers", "group", "customers_customer_changelist", "customers.view_customer"),
                ],
            },
            {
                "title": "Systems",
                "items": [
                    sidebar("Connections", "lan", "connectors_connection_changelist", "connectors.view_connection"),
                    {
                        **sidebar(
                            "Links", "link", "connectors_customerlink_changelist", "connectors.view_customerlink"
                        ),
                        # "Needs you" lies below this address and has an entry of its own.
                        "active": lambda request: (
                            request.path.startswith("/admin/connectors/customerlink/")
                            and not request.path.endswith("/needs-you/")
                        ),
                    },
                    sidebar("Runs", "sync", "connectors_syncrun_changelist", "connectors.view_syncrun"),
                    sidebar("Issues", "report", "connectors_issue_changelist", "connectors.view_issue"),
                    sidebar("API keys", "key", "connectors_apikey_changelist", "connectors.view_apikey"),
                ],
            },
            {
                "title": "Logs",
                "items": [
                    sidebar(
                        "Changes", "history", "customers_customerchange_changelist", "customers.view_customerchange"
                    ),
                    sidebar(
                        "Conflicts", "compare_arrows", "connectors_conflict_changelist", "connectors.view_conflict"
                    ),
                ],
            },
            {
                "title": "Access",
                "items": [
                    sidebar("Users", "person", "auth_user_changelist", "auth.view_user"),
                    sidebar("Groups", "groups", "auth_group_changelist", "auth.view_group"),
                    sidebar("Organizations", "domain", "customers_organization_changelist"),
                ],
            },
        ],
    },
}


def unsafe() -> list[str]:
    """What must be set before this configuration may serve others."""
    wrong = []
    if PRODUCTION:
        if len(SECRET_KEY) < 40:
            wrong.append("SECRET_KEY: set at least 40 random characters")
        if not SEALING_KEYS:
            wrong.append("SEALING_KEYS: set one or more base64url keys of 32 random bytes")
        if not ALLOWED_HOSTS or "*" in ALLOWED_HOSTS:
            wrong.append("ALLOWED_HOSTS: name the hosts that this hub answers for, without '*'")
        if DEBUG:
            wrong.append("DEBUG: must be off")
    else:
        for host in ALLOWED_HOSTS:
            try:
                local = ipaddress.ip_address(host.strip("[]")).is_loopback
            except ValueError:
                local = host in ("localhost", ".localhost", "testserver")
            if not local:
                wrong.append(f"ALLOWED_HOSTS names {host!r}, beyond this machine: set PRODUCTION=true")
    return wrong


if problems := unsafe():
    raise ImproperlyConfigured("This configuration is not safe to run. " + "; ".join(problems) + ".")
