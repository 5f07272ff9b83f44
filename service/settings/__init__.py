"""The settings of the service: every `CHAT_*` variable, and every limit that no variable changes."""

from service.settings.checks import (
    ASYMMETRIC,
    CHECKPOINT_METADATA_BYTES_MAX,
    CHECKPOINTS_MAX,
    DELETE_BATCH_ITEMS,
    JSON_LEVELS_MAX,
    KEY_DOTS_MAX,
    MESSAGE_BYTES_MAX,
    METADATA_BYTES_MAX,
    PARSED_TIMES_MAX,
    SMALL_BODY_BYTES_MAX,
    SUMMARY_BYTES_MAX,
    WINDOW_SEQS_MAX,
    host_name,
    without_password,
)
from service.settings.engine_record import ENGINE_RECORD
from service.settings.key_files import public_key
from service.settings.variables import Settings

__all__ = [
    "ASYMMETRIC",
    "CHECKPOINTS_MAX",
    "CHECKPOINT_METADATA_BYTES_MAX",
    "DELETE_BATCH_ITEMS",
    "ENGINE_RECORD",
    "JSON_LEVELS_MAX",
    "KEY_DOTS_MAX",
    "MESSAGE_BYTES_MAX",
    "METADATA_BYTES_MAX",
    "PARSED_TIMES_MAX",
    "SMALL_BODY_BYTES_MAX",
    "SUMMARY_BYTES_MAX",
    "WINDOW_SEQS_MAX",
    "Settings",
    "host_name",
    "public_key",
    "without_password",
]
