"""Prints docs/openapi.json, which the service serves as `/openapi.json` (`make openapi` writes the file)."""

import json
import sys

from service.app import create_app
from service.settings import Settings

if __name__ == "__main__":
    app = create_app(Settings(_env_file=None))
    sys.stdout.write(json.dumps(app.openapi(), indent=1, sort_keys=True) + "\n")
