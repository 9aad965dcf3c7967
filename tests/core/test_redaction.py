"""What is masked, and what must survive: a report without versions and error lines helps nobody."""

import json
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core.redaction import MASK, Private, Redactor

SECRET = "s3cr/t+Val=ue-9"
PRIVATE = Private(
    secrets=(SECRET, "first line\nsecond line"),
    users=("quentinx", "root", "vllm"),
    hosts=("spark-zq7", "git.planted.example.org"),
    places=(
        ("/srv/planted/quentinx", "~"),
        ("/srv/planted/quentinx/clone", "<clone>"),
        ("/root", "~"),
        ("/", "never"),
    ),
    versions=frozenset({"10.4.0.35"}),
)
REDACTOR = Redactor(PRIVATE)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("HF_TOKEN=abc", "HF_TOKEN=****"),
        ("export MY_SERVICE_PASSWORD='a b'", "export MY_SERVICE_PASSWORD='****'"),
        ('{"api_key": "abc", "n": 5}', '{"api_key": "****", "n": 5}'),
        (r"{\"password\": \"a\\\"b\", \"n\": 5}", r"{\"password\": \"****\", \"n\": 5}"),
        ("{'api_key': ['abc'], 'n': 5}", "{'api_key': ['****'], 'n': 5}"),
        ("vllm serve --api-key abc --port 8000", "vllm serve --api-key **** --port 8000"),
        ("Authorization: Basic eHl6OnBx", "Authorization: ****"),
        ("-H 'authorization: Bearer abcdef' next", "-H 'authorization: ****' next"),
        ("Set-Cookie: a=b; c=d", "Set-Cookie: ****"),
        ("https://me:w@rd@github.com/x.git", "https://****@github.com/x.git"),
        (r"https:\/\/me:word@github.com\/x", r"https:\/\/****@github.com\/x"),
        (
            "https://mirror/simple and http://pkg.corp.example.net:80/",
            "https://<host>/simple and http://<host>:80/",
        ),
        ("got hf_abcdEFGH1234 and ghp_0123456789abcdef0123", "got **** and ****"),
        ("AKIAIOSFODNN7ABCDEFG eyJhbGciOiJI.eyJzdWIiOiIx.SflKx", "**** ****"),
        (
            "git@github.com:me/x me@build7:/x bob@corp.example.org bob@bücher.de",
            "<user>@github.com:me/x <user>@<host>:/x <email> <email>",
        ),
        (
            "10.0.0.5 192.168.1.4:80 [2001:db8::7]:80 fe80::1%eth0",
            "<ip> <ip>:80 [<ip>]:80 <ip>%eth0",
        ),
        (r"up\n10.0.0.5\n02:42:ac:11:00:02", r"up\n<ip>\n<mac>"),
        (
            (
                "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\naC1rZXk=\n-----END OPENSSH PRIVATE"
                " KEY-----\nafter"
            ),
            "<private key>\nafter",
        ),
        (
            "aC1rZXktdjEAAAAABG5vbmU\nAAAA==\n-----END RSA PRIVATE KEY-----\nafter",
            "<private key>\nafter",
        ),
        ("/srv/planted/quentinx/clone/a.py -I/srv/planted/quentinx/b", "<clone>/a.py -I~/b"),
        ("-I/root/x /root /rootfs vendor/root/a", "-I~/x ~ /rootfs vendor/root/a"),
        ("/home/other/x /Users/other/y", "/home/<user>/x /Users/<user>/y"),
        (
            "torchinductor_quentinx QUENTINX, quentinx's\\nquentinx",
            "torchinductor_<user> <user>, <user>'s\\n<user>",
        ),
        ("spark-zq7 spark-zq7.corp.example.org SPARK-ZQ7: x", "<host> <host> <host>: x"),
        ("\x1b[32mquentinx\x1b[0m", "<user>"),
        (json.dumps(f"a\n{SECRET}\nquentinx"), r'"a\n****\n<user>"'),
    ],
)
def test_private_things_are_masked_and_their_context_stays(text: str, masked: str) -> None:
    assert REDACTOR.text(text) == masked


@pytest.mark.parametrize(
    "line",
    [
        "error: undefined symbol: _ZN3c106detail@GLIBCXX_3.4.30 (root cause), exit code 137",
        " + nvidia-cudnn-cu13==9.13.0.50",
        "nvidia-curand            10.4.0.35",
        (
            "nvidia_cudnn_cu13-9.13.0.50-py3-none-manylinux_2_27_aarch64.whl,"
            " libcudart.so.13.0.88.1, cudnn version 9.1.0.70"
        ),
        "tiktoken==0.12.0 tokenizers-0.22.1 partial-json-parser 0.2.1.1.post7",
        (
            "max_num_batched_tokens=8192, eos_token_id=2, num_tokens: 5, eos_token='<|endoftext|>',"
            " token_ids=[1, 2]"
        ),
        '"HF_TOKEN": "unset (default)", "VLLM_API_KEY": null',
        "SyntaxError: unexpected token: foo",
        "first token: seconds, per output token: median",
        "127.0.0.1:8000 [::1]:80 0.0.0.0 std::vector<at::Tensor> a::b 12:30:45 0000:01:00.0",
        (
            "maintainers@invalid a@b.invalid https://github.com/vllm-project/vllm.git hf_overrides"
            " hf_quant_config"
        ),
        "import vllm from vendor/vllm as root",
        (
            "commit db9527a46873454610df6dbedf79a36d6bf1a7f6 sha256"
            " dde46f1efbe846e5bd0c5c4ec6ec71842c42254c7ff3d9bebb2a57028715d380"
        ),
        "torch-2.13.0%2Bcpu-cp312-cp312-linux_aarch64.whl C:\\new\\table 100%25",
        (
            "/usr/include/c++/13/bits/stl_vector.h:1234:56: fatal error: Python.h: No such file or"
            " directory"
        ),
    ],
)
def test_what_a_bug_report_is_about_survives(line: str) -> None:
    assert REDACTOR.text(line) == line


def spellings(text: str) -> list[str]:
    return [text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]


args = st.text(st.characters(blacklist_categories=("Cs",)), min_size=0, max_size=60)
secrets = st.text(
    st.sampled_from(string.ascii_letters + string.digits + "-_/+=%&?#:.,;!$\"'\\@~üß"),
    min_size=9,
    max_size=40,
).filter(lambda text: text.strip("*-= "))
anything = st.one_of(
    args,
    st.text(),
    st.lists(
        st.sampled_from(
            [
                *"/:@%=.-_<>\"'\\ \n",
                "quentinx",
                "root",
                SECRET,
                "token",
                "https://",
                "10.0.0.5",
                MASK,
                "<user>",
                "%2F",
                "\x1b[",
                "/root",
                "PRIVATE KEY-----",
            ]
        )
    ).map("".join),
)


@fuzz(fast=100, deep=10_000)
@given(anything)
def test_masking_never_raises(text: str) -> None:
    assert SECRET not in REDACTOR.text(text)


@fuzz(fast=100, deep=10_000)
@given(st.binary(max_size=200))
def test_any_bytes_are_masked_or_refused(content: bytes) -> None:
    masked = REDACTOR.content(content + SECRET.encode())
    assert masked is None or SECRET.encode() not in masked


@fuzz(fast=100, deep=10_000)
@given(secrets, args, args, st.integers(0, 20))
def test_secret_at_any_place_is_gone_also_as_json_writes_it(
    secret: str, before: str, after: str, number: int
) -> None:
    forms = spellings(secret)
    text = before + forms[number % len(forms)] + after
    # Where the surroundings themselves hold it, there is nothing to tell.
    assume(secret not in before + " " + after)
    masked = Redactor(Private(secrets=(secret,))).text(text)
    assert all(form not in masked for form in forms if form)


@fuzz(fast=100, deep=10_000)
@given(args, args)
def test_user_is_masked_as_a_whole_name_only(before: str, after: str) -> None:
    text = f"{before} quentinx/{after} squentinxes"
    masked = Redactor(Private(users=("quentinx",))).text(text)
    assert "squentinxes" in masked
    assert " quentinx/" not in masked


@fuzz(fast=100, deep=10_000)
@given(st.text(), st.text(), st.text(), st.text(), st.text())
def test_any_private_names_can_be_masked(
    secret: str, user: str, host: str, place: str, text: str
) -> None:
    redactor = Redactor(
        Private(
            secrets=(secret,),
            users=(user,),
            hosts=(host,),
            places=((place, "<place>"), (f"/{place}", "~")),
        )
    )
    assert redactor.text(f"{text}{user} {secret}\n{host}{place}") is not None


def test_secrets_of_several_lines_are_masked_whole_and_line_by_line() -> None:
    assert REDACTOR.text("a first line\nsecond line b, first line") == "a **** b, ****"


def test_values_that_stand_for_no_secret_are_no_secret() -> None:
    assert (
        Redactor(Private(secrets=("none", "EMPTY", "***", "abc"))).text(
            "CUDA none, EMPTY, *** and abc"
        )
        == "CUDA none, EMPTY, *** and abc"
    )


def test_what_is_no_text_is_refused() -> None:
    assert REDACTOR.content("utf-16 quentinx".encode("utf-16")) is None


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("logs/20261123-quentinx.log", "logs/20261123-user.log"),
        ("cmake/../../etc/passwd", "cmake/etc/passwd"),
        ("/abs/olute", "abs/olute"),
        ("a b\n<c>", "a-b-c"),
        ("..", "file"),
        (f"{SECRET}.log", None),
    ],
)
def test_names_in_the_archive_are_masked_and_stay_below_it(name: str, masked: str | None) -> None:
    found = REDACTOR.name(name)
    assert masked is None or found == masked
    assert "s3cr" not in found
    assert found.isprintable()


def test_long_lines_take_no_quadratic_time() -> None:
    line = ("a" * 50 + "-" + "token" + "@" + "%20" + "1:") * 4000
    assert REDACTOR.text(line) is not None
