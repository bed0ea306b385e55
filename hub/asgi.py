"""The ASGI application.

RootFi's `api_key` header does not arrive through Django's ASGI handler: serve the mirrored APIs with `hub.wsgi`.
"""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")
application = get_asgi_application()
