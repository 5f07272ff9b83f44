"""The plain design beside the service: FastAPI with an ORM over two relational tables, measured in one run."""
