"""Times, as BSON keeps them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import bson
from bson.codec_options import CodecOptions
from hypothesis import given
from hypothesis import strategies as st

from service import clock

AWARE: CodecOptions[dict[str, datetime]] = CodecOptions(tz_aware=True)
zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45)), timezone(-timedelta(hours=11))])
# In UTC, too, a time must be of the years 1 to 9999.
times = st.datetimes(timezones=zones).filter(lambda time: 1 < time.year < 9_999)


@given(times)
def test_a_cut_time_is_what_bson_returns_of_it(time: datetime) -> None:
    cut = clock.to_milliseconds(time)
    assert bson.decode(bson.encode({"at": cut}), AWARE)["at"] == cut
    assert clock.to_milliseconds(cut) == cut
    assert timedelta(0) <= time - cut < timedelta(milliseconds=1)
    assert cut.tzinfo is time.tzinfo


def test_now_is_the_time_in_utc() -> None:
    before = datetime.now(UTC)
    now = clock.now()
    assert now.tzinfo is UTC
    assert now.microsecond % 1000 == 0
    assert before - timedelta(milliseconds=1) < now <= datetime.now(UTC)


def test_the_epoch_is_bsons_time_zero() -> None:
    assert bson.encode({"at": clock.EPOCH})[8:16] == bytes(8)
