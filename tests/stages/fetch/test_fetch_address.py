from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.drops import Dropped, DropReason
from stages.fetch.address import Guard, parse, redirected
from stages.settings import DownloadSettings

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
REFUSED = """
    0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 172.16.0.1
    192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::7f00:1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1
    2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 4000::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
""".split()  # noqa: SIM905


def dropped(work, *args):
    with pytest.raises(Dropped) as caught:
        work(*args)
    return caught.value.reason


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address):
    assert Guard(DownloadSettings(), None).allows(ip_address(address), 80)


@pytest.mark.parametrize("address", REFUSED)
def test_inner_addresses_are_refused(address):
    assert not Guard(DownloadSettings(), None).allows(ip_address(address), 80)


@given(st.ip_addresses())
def test_nothing_that_is_not_global_is_ever_allowed(address):
    assert address.is_global or not Guard(DownloadSettings(), None).allows(address, 80) or address.ipv4_mapped.is_global


@pytest.mark.parametrize("address", [address for address in REFUSED if not ip_address(address).is_loopback])
def test_allow_loopback_allows_loopback_alone(address):
    guard = Guard(DownloadSettings(allow_loopback=True), None)
    assert guard.allows(ip_address("127.0.0.1"), 80)
    loopback_within = address in ("::ffff:127.0.0.1", "64:ff9b::7f00:1")
    assert guard.allows(ip_address(address), 80) == loopback_within


def test_the_sample_port_is_the_only_one_that_it_opens():
    guard = Guard(DownloadSettings(), 4321)
    assert guard.allows(ip_address("127.0.0.1"), 4321)
    assert not guard.allows(ip_address("127.0.0.1"), 80)
    assert not guard.allows(ip_address("10.0.0.1"), 4321)


@pytest.mark.parametrize(
    "host", ["127.1", "0x7f000001", "0177.0.0.1", "017700000001", "2130706433", "127.0.0.1.", "１２７.0.0.1"]
)
def test_spellings_of_an_address_that_the_c_library_would_accept(host):
    assert dropped(Guard(DownloadSettings(), None).route, parse(f"http://{host}/")) == DropReason.FORBIDDEN_ADDRESS


def test_the_sample_host_leads_to_the_sample_port_whatever_the_url_says():
    guard = Guard(DownloadSettings(), 4321)
    assert (
        str(guard.route(parse("https://sample.localhost:8443/a%2Fb.jpg?c=%2F")))
        == "http://127.0.0.1:4321/a%2Fb.jpg?c=%2F"
    )
    assert Guard(DownloadSettings(), None).route(parse("http://sample.localhost/")).host == "sample.localhost"


def test_what_is_no_url_is_a_bad_url():
    assert dropped(parse, "http://user@a.test/") == dropped(parse, None) == DropReason.BAD_URL


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        (None, "http_error"),
        ("", "http_error"),
        ("file:///x", "bad_url"),
        ("data:image/png,", "bad_url"),
        ("http://[", "bad_url"),
    ],
)
def test_redirects_that_lead_nowhere(location, reason):
    assert dropped(redirected, parse("http://a.test/"), location, 0, DownloadSettings()) == reason


def test_redirects_are_counted_and_joined():
    told = DownloadSettings(max_redirects=1)
    assert str(redirected(parse("http://a.test/x/y"), "../z?q=%2F", 0, told)) == "http://a.test/z?q=%2F"
    assert dropped(redirected, parse("http://a.test/"), "/x", 1, told) == DropReason.REDIRECT_LOOP
