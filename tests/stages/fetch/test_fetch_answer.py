from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from schemas.drops import Dropped, DropReason
from stages.fetch.answer import Refused, check_status, opted_out, user_agent, wait_s
from stages.settings import DownloadSettings

OURS = "faceshards/0.1 (+image dataset builder)"
SETTINGS = DownloadSettings(retries=2)


@pytest.mark.parametrize(
    "tag",
    [
        "noai",
        "NoImageAI",
        "noindex, nofollow",
        "nofollow,noimageindex",
        "none",
        "faceshards: None",
        "faceshards: noai",
        "FaceShards:nofollow, noai",
        "*: noai",
        "otherbot: nofollow, faceshards: noindex",
        "max-image-preview: large, noai",
        "unavailable_after: 25 Jun 2030 15:00:00 PST, noai",
        "unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai",
        "faceshards: unavailable_after: Tuesday, 25-Jun-30 15:00:00 GMT, noai",
    ],
)
def test_opt_outs(tag):
    assert opted_out([tag], OURS)


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "all",
        "nofollow",
        "otherbot: noai",
        "otherbot: nofollow, noai",
        "noaix",
        "max-snippet: 0",
        "max-image-preview: none",
        "::,,:",
        "360bot: noai",
    ],
)
def test_no_opt_outs(tag):
    assert not opted_out([tag], OURS)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "http_error"),
        (402, "access_denied"),
        (429, "rate_limited"),
        (599, "server_error"),
        (304, "http_error"),
        (999, "http_error"),
    ],
)
def test_refusals(status, reason):
    with pytest.raises(Dropped) as caught:
        check_status(status, None)
    assert caught.value.reason == reason


def refusal(retry_after):
    with pytest.raises(Refused) as caught:
        check_status(503, retry_after)
    return caught.value


@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [("2", 2.0), (None, 0.25), ("soon", 0.25), ("-1", 0.25), ("²", 0.25), ("0", 0.0), ("9" * 400, None)],
)
def test_retry_after_in_seconds(retry_after, wait):
    if wait is None:
        with pytest.raises(Refused):
            wait_s(refusal(retry_after), 0, SETTINGS, left_s=9.0)
    else:
        assert wait_s(refusal(retry_after), 0, SETTINGS, left_s=9.0) == wait


@pytest.mark.parametrize("zone", [UTC, None])
def test_retry_after_as_a_date(zone):
    date = format_datetime((datetime.now(UTC) + timedelta(seconds=5)).replace(tzinfo=zone))
    assert 2 < wait_s(refusal(date), 0, SETTINGS, left_s=9.0) <= 5
    assert wait_s(refusal("Mon, 01 Jan 2001 00:00:00 GMT"), 0, SETTINGS, left_s=9.0) == 0


@pytest.mark.parametrize("date", ["Mon, 01 Jan 2024 00:00:00 +99999999999999999999", f"1 Jan 2024 0:0:{'9' * 20} GMT"])
def test_retry_after_as_a_date_beyond_all_dates_is_none(date):
    assert wait_s(refusal(date), 0, SETTINGS, left_s=9.0) == 0.25


def test_the_back_off_doubles_and_ends():
    failure = Dropped(DropReason.CONNECTION_ERROR)
    assert [wait_s(failure, attempt, SETTINGS, left_s=9.0) for attempt in (0, 1)] == [0.25, 0.5]
    for attempt, left_s in ((2, 9.0), (0, 0.2)):
        with pytest.raises(Dropped):
            wait_s(failure, attempt, SETTINGS, left_s)


@pytest.mark.parametrize(
    "reason", ["not_found", "opted_out", "access_denied", "forbidden_address", "timeout", "dns_error"]
)
def test_final_failures_are_never_repeated(reason):
    with pytest.raises(Dropped):
        wait_s(Dropped(DropReason(reason)), 0, SETTINGS, left_s=9.0)


def test_the_user_agent_names_a_contact_when_there_is_one():
    assert user_agent(DownloadSettings(user_agent="x/1", contact="me@example.org")) == "x/1 (me@example.org)"
    assert user_agent(DownloadSettings(user_agent="x/1")) == "x/1"
