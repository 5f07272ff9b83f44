"""MongoDB: connections, deadlines, transactions and indexes."""

from service.database.changes import Change
from service.database.database import Database
from service.database.driver_errors import DOCUMENT_TOO_LARGE
from service.database.indexes import IndexPolicy
from service.database.raw_documents import Budget
from service.database.transactions import Transaction

__all__ = ["DOCUMENT_TOO_LARGE", "Budget", "Change", "Database", "IndexPolicy", "Transaction"]
