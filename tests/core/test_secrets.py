"""Secret names and values: one vocabulary for screens, logs, exported lines and reports."""

import string
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core import settings
from workspace.core.known_settings import has_login, is_secret, secrets_of
from workspace.core.paths import Layout
from workspace.core.redaction import Private, Redactor
from workspace.server import command

NOWHERE = Layout(Path("/nowhere at all"))
OWNERS = ("OPENAI", "MY", "DB", "SSH", "GITLAB", "AZURE_OPENAI", "WANDB", "PG", "X2")
TERMS = (
    "KEY",
    "KEYS",
    "PRIVATE_KEY",
    "API_KEY",
    "APIKEY",
    "ACCESS_KEY_ID",
    "PASS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "PWD",
    "PAT",
    "TOKEN",
    "SECRET",
    "AUTH",
    "OAUTH",
    "CREDENTIALS",
    "CREDS",
    "COOKIE",
    "JWT",
    "PSK",
    "DSN",
    "WEBHOOK_URL",
)
names = st.builds(
    lambda owner, term, more: f"{owner}_{term}{more}",
    st.sampled_from(OWNERS),
    st.sampled_from(TERMS),
    st.sampled_from(("", "_2", "_PROD", "_OLD")),
)
values = st.text(string.ascii_letters + string.digits + "+-_.", min_size=8, max_size=30)


@fuzz(fast=100, deep=5000)
@given(names, values)
@example("OPENAI_KEY", "caseKEYaaaa1111")
@example("MY_PRIVATE_KEY", "caseKEYbbbb2222")
@example("DB_PASS", "caseKEYcccc3333")
@example("SSH_PASSPHRASE", "caseKEYdddd4444")
@example("GITLAB_PAT", "caseKEYeeee5555")
def test_secret_is_on_no_screen_whatever_its_name(name: str, value: str) -> None:
    assume(value not in f"{name} printed /a /c scripts export LD_LIBRARY_PATH PATH")
    loaded = settings.load(NOWHERE, environ={name: value, "HOME": "/h"})
    assert is_secret(name)
    assert is_secret(name.lower())
    assert value in loaded.secrets
    for text in (value, f"uv printed {value}.", f"{name}={value}", f'{{"{name}": "{value}"}}'):
        assert value not in loaded.masked(text)
        assert value not in loaded.presentable(text)
        assert value not in Redactor(Private(secrets=loaded.secrets)).text(text)
    # A log of another machine, whose secrets are known by their names alone.
    if value.strip("-_.+"):
        assert value not in Redactor(Private()).text(f"{name}={value}")
    environment = {name: value, "OTHER": f"Bearer {value}", "PLAIN": "shown"}
    lines = "\n".join(command.lines(NOWHERE, environment, {}))
    assert value not in lines
    assert "PLAIN=shown" in lines


@fuzz(fast=60, deep=2000)
@given(
    st.sampled_from(("HF_ENDPOINT", "UV_DEFAULT_INDEX", "HTTPS_PROXY", "DATABASE_URL")),
    st.sampled_from(("https", "http", "postgres", "socks5h", "redis")),
    st.text(string.ascii_letters, min_size=1, max_size=8),
    values,
)
def test_password_in_an_address_is_a_secret(name: str, scheme: str, user: str, value: str) -> None:
    address = f"{scheme}://{user}:{value}@mirror.corp.example.net/a"
    assume(value not in address.replace(f":{value}@", ""))
    loaded = settings.load(NOWHERE, environ={name: address, "HOME": "/h"})
    assert has_login(address)
    assert value not in loaded.masked(f"{name}={address}")
    assert value not in loaded.masked(f"the server refuses {value}")
    assert value not in "\n".join(command.lines(NOWHERE, {name: address}, {}))


def test_token_as_the_user_of_an_address_is_a_secret_and_a_name_is_none() -> None:
    token = "glx0123456789abcdef"
    assert secrets_of([("X", f"https://{token}@host/x")]) == (token,)
    assert not has_login("ssh://git@github.com/a/b")
    assert secrets_of([("X", "ssh://git@github.com/a/b")]) == ()


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "XAUTHORITY",
        "GIT_ASKPASS",
        "TOKENIZERS_PARALLELISM",
        "TIKTOKEN_ENCODINGS_BASE",
        "SCCACHE_S3_KEY_PREFIX",
        "GNOME_KEYRING_CONTROL",
        "VLLM_ENABLE_PREGRAD_PASSES",
        "COMPASS",
        "MONKEY",
        "PATH",
        "UV_KEYRING_PROVIDER",
        "VLLM_PATTERN_MATCH",
        "DBUS_SESSION_BUS_ADDRESS",
    ],
)
def test_name_of_another_thing_is_no_secret(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("machine h login u password hunter2", "machine h login u password ****"),
        ("  password hunter2", "  password ****"),
        ("DefaultEndpointsProtocol=https;AccountKey=aGk=", "DefaultEndpointsProtocol=https;Acc"),
        ("{'db_pass': 'hunter2'}", "{'db_pass': '****'}"),
        ("cache_key = hashed(x)", "cache_key = hashed(x)"),
        ("the password required here", "the password required here"),
        ("SSH_AUTH_SOCK=/run/x", "SSH_AUTH_SOCK=/run/x"),
        ("prefix_cache_key: block", "prefix_cache_key: block"),
    ],
)
def test_form_of_a_secret_in_a_text(text: str, masked: str) -> None:
    assert Redactor(Private()).text(text).startswith(masked)
    assert "hunter2" not in Redactor(Private()).text(text)
