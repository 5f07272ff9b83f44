"""The HTTP API: parse, one call of the service, shape the answer."""

from service.api import paths as paths  # makes the kind of path parameter `id` known before any route is made
