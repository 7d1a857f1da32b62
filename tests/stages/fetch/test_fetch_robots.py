import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.fetch import address
from stages.fetch.manners import robots
from stages.fetch.manners.robots import Rules


def url(target):
    return address.parse("http://a.test/x")._replace(target=target)


def allowed(text, target, name="faceshards"):
    return Rules(text.encode() if isinstance(text, str) else text, name).allow(url(target))


def rules(*lines):
    return "\n".join(["User-agent: *", *lines])


@pytest.mark.parametrize(
    ("text", "allows"),
    [
        ("", True),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow:", True),
        ("User-agent: otherbot\nDisallow: /", True),
        ("User-agent: FaceShards\nDisallow: /", False),
        ("User-agent: faceshards/1.0\nDisallow: /", False),
        ("User-agent: faceshardsbot\nDisallow: /", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: faceshards\nAllow: /", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: faceshards\n", True),
        ("User-agent: faceshards\nAllow: /\n\nUser-agent: *\nDisallow: /", True),
        ("User-agent: otherbot\nUser-agent: faceshards\nDisallow: /", False),
        ("User-agent: faceshards\nUser-agent: otherbot\nDisallow: /", False),
        ("User-agent: faceshards\nDisallow: /b\nUser-agent: otherbot\nDisallow: /", True),
        ("User-agent: faceshards\nDisallow: /b\n\nUser-agent: faceshards\nDisallow: /a", False),
        ("User-agent: faceshards\nCrawl-delay: 9\nUser-agent: otherbot\nDisallow: /", True),
        ("Disallow: /\nUser-agent: otherbot\nDisallow: /", True),
        ("user-agent:*\r\ndisallow:/a", False),
        ("User-agent: *\rDisallow: /a", False),
        ("\ufeffUser-agent: *\nDisallow: /a", False),
        ("User agent: *\nDissallow: /a", False),
        ("User-agent: *  # all\nDisallow: /a # this", False),
        ("  User-agent : *\n\tDisallow : /a", False),
        ("User-agent: *\nDisallow: a", False),
        ("Sitemap: x\nnonsense\n:\nUser-agent: *\nnothing\nDisallow: /a", False),
        ("<html><body>User-agent: *<br>Disallow: /</body></html>", True),
        ("User-agent: *\nDisallow: /\0a", True),
    ],
)
def test_whom_rules_are_meant_for(text, allows):
    assert allowed(text, "/a/b.jpg") is allows


@pytest.mark.parametrize(
    ("lines", "target", "allows"),
    [
        # the examples of RFC 9309, 5.2, and of Google's documentation
        (["Allow: /example/page/", "Disallow: /example/page/disallowed.gif"], "/example/page/disallowed.gif", False),
        (["Allow: /example/page/", "Disallow: /example/page/disallowed.gif"], "/example/page/x.gif", True),
        (["Allow: /p", "Disallow: /"], "/page", True),
        (["Allow: /folder", "Disallow: /folder"], "/folder/page", True),
        (["Allow: /page", "Disallow: /*.htm"], "/page.htm", False),
        (["Allow: /page", "Disallow: /*.ph"], "/page.php5", True),
        (["Allow: /$", "Disallow: /"], "/", True),
        (["Allow: /$", "Disallow: /"], "/page.htm", False),
        (["Disallow: /fish"], "/fish.html", False),
        (["Disallow: /fish"], "/Fish.asp", True),
        (["Disallow: /fish*"], "/fishheads/yummy.html", False),
        (["Disallow: /fish/"], "/fish", True),
        (["Disallow: /*.php$"], "/folder/filename.php", False),
        (["Disallow: /*.php$"], "/filename.php?parameters", True),
        (["Disallow: /fish*.php"], "/fishheads/catfish.php?parameters", False),
        (["Disallow: *.gif$"], "/x.gif", False),
        (["Disallow: /a*b*c$"], "/a1b2c", False),
        (["Disallow: /a*b*c$"], "/acb", True),
        (["Disallow: /ab*ab$"], "/ab", True),
        (["Disallow: /ab*ab$"], "/abab", False),
        (["Disallow: /*?"], "/x?y=1", False),
        (["Disallow: /**a"], "/xa", False),
        (["Disallow: *"], "/x", False),
        # percent-encoding (2.2.2)
        (["Disallow: /foo/bar?baz=http://foo.bar"], "/foo/bar?baz=http://foo.bar", False),
        (["Disallow: /ü"], "/%C3%BC.jpg", False),
        (["Disallow: /%c3%bc"], "/%C3%BC.jpg", False),
        (["Disallow: /%61b"], "/ab", False),
        (["Disallow: /a%2Fb"], "/a/b", True),
        (["Disallow: /"], "/robots.txt", True),
    ],
)
def test_which_paths_rules_are_about(lines, target, allows):
    assert allowed(rules(*lines), target) is allows


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_windows_other_form_of_text_is_read(encoding):
    text = rules("Disallow: /a")
    assert not allowed(f"\ufeff{text}".encode(encoding), "/a.jpg")
    assert allowed(f"\ufeff{text}".encode(encoding), "/b.jpg")


@given(st.binary(max_size=400), st.text("/ab*$%4", max_size=9))
def test_any_bytes_are_a_robots_txt(text, path):
    assert allowed(text, f"/{path}") in (True, False)
    assert allowed(b"User-agent: *\nDisallow: " + text, f"/{path}") in (True, False)


HOSTILE = {
    "one line": b"User-agent: *\nDisallow: /" + b"a" * 10_000_000,
    "wildcards": rules("Disallow: /" + "*a" * 200_000).encode(),
    "rules": rules(*["Disallow: /x"] * 100_000).encode(),
    "rules with wildcards": rules(*["Disallow: /*a*a*a*a*b"] * 30_000).encode(),
    "rules for many names": b"".join(b"User-agent: b%d\n" % n for n in range(2000)) + b"Disallow: /x\n" * 2000,
    "names": b"\n".join(b"User-agent: bot%s" % (b"x" * n) for n in range(1000)) * 10,
    "no end of names": b"User-agent: a\n" * 100_000,
    "zeros": bytes(5_000_000),
    "line ends": b"\n" * 5_000_000,
    "colons": b":" * 5_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_take_little_time(kind):
    begun = time.process_time()
    rules = Rules(HOSTILE[kind][: robots.MOST_BYTES], "faceshards")
    read = time.process_time()
    for _ in range(10):
        rules.allow(url("/" + "a" * 8000))
    assert read - begun < 2
    assert time.process_time() - read < 0.5


@pytest.mark.parametrize("kind", ["one line", "wildcards", "rules for many names", "rules with wildcards"])
def test_more_rules_than_can_be_heeded_are_a_no(kind):
    assert not allowed(HOSTILE[kind][: robots.MOST_BYTES], "/y")


@pytest.mark.parametrize(
    ("agent", "name"),
    [
        ("faceshards/0.1 (+x)", "faceshards"),
        ("My_Bot-x 1", "my_bot-x"),
        ("img2dataset/1.45", "img2dataset"),
        ("123", "123"),
        (" ", "*"),
        ("", "*"),
    ],
)
def test_our_name(agent, name):
    assert robots.name_of(agent) == name


@pytest.mark.parametrize("line", ["img2dataset", "img2dataset/1.0", "Img2Dataset"])
def test_a_name_may_hold_digits(line):
    assert not allowed(f"User-agent: {line}\nDisallow: /", "/a", "img2dataset")
