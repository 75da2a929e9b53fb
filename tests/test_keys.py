"""API keys: making, checking, revoking."""

import hashlib
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve_app.database import Database, keys
from serve_app.errors import InvalidKey, ValidationFailed
from serve_app.keys import KeyStore

GIVEN = "a-key-of-our-own-0001"


@pytest.fixture
def store(database: Database) -> KeyStore:
    return KeyStore(database)


def test_a_new_key_opens_the_door_it_was_made_for(store: KeyStore) -> None:
    plain, principal = store.create("laptop", "alice", {"generate", "admin"})
    assert plain.startswith("cns_")
    assert len(plain) >= 40
    assert store.authenticate(plain) == principal
    assert principal.tenant == "alice"
    assert principal.scopes == {"generate", "admin"}
    other, _ = store.create("laptop", "alice", {"generate"})
    assert other != plain


@pytest.mark.parametrize("key", ["", "x", "cns_", "cns_" + "a" * 43, "ключ", "\ud800", "\x00", "k" * 1_000_000])
def test_any_other_text_is_refused(store: KeyStore, key: str) -> None:
    store.create("laptop", "alice", {"generate"})
    with pytest.raises(InvalidKey):
        store.authenticate(key)


def test_only_the_hash_is_stored(store: KeyStore, database: Database, tmp_path: Path) -> None:
    plain, _ = store.create("laptop", "alice", {"generate"})
    with database.read() as connection:
        assert connection.scalar(sa.select(keys.c.hash)) == hashlib.sha256(plain.encode()).hexdigest()
    database.close()
    for file in tmp_path.iterdir():
        assert plain.encode() not in file.read_bytes()


def test_a_given_key_may_be_given_again(store: KeyStore) -> None:
    first = store.create("demo", "alice", {"generate"}, GIVEN)
    assert store.create("demo", "alice", {"generate"}, GIVEN) == first
    assert first[0] == GIVEN
    assert len(store.list()) == 1
    with pytest.raises(ValidationFailed, match="another tenant"):
        store.create("demo", "bob", {"generate"}, GIVEN)
    with pytest.raises(ValidationFailed, match="other scopes"):
        store.create("demo", "alice", {"admin"}, GIVEN)


def test_a_revoked_key_is_refused_here_at_once_and_stays_revoked(store: KeyStore) -> None:
    plain, principal = store.create("demo", "alice", {"generate"}, GIVEN)
    store.authenticate(plain)
    assert store.revoke(principal.key_id)
    with pytest.raises(InvalidKey):
        store.authenticate(plain)
    assert not store.revoke(principal.key_id)
    assert not store.revoke("unknown")
    with pytest.raises(ValidationFailed, match="revoked"):
        store.create("demo", "alice", {"generate"}, GIVEN)


def test_another_process_notices_a_revocation_soon(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = KeyStore(database), KeyStore(database)
    plain, principal = here.create("demo", "alice", {"generate"})
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    elsewhere.authenticate(plain)
    here.revoke(principal.key_id)
    elsewhere.authenticate(plain)
    now += 5.0
    with pytest.raises(InvalidKey):
        elsewhere.authenticate(plain)


def test_the_list_shows_everything_but_the_key(store: KeyStore) -> None:
    plain, first = store.create("one", "alice", {"generate"})
    _, second = store.create("two", "bob", {"admin"})
    store.revoke(second.key_id)
    records = store.list()
    assert [(record.name, record.tenant, record.revoked_at is None) for record in records] == [
        ("one", "alice", True),
        ("two", "bob", False),
    ]
    assert records[0].principal == first
    assert plain not in repr(records)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", "alice", {"generate"}, None), "name"),
        (("n" * 129, "alice", {"generate"}, None), "name"),
        (("n", "", {"generate"}, None), "tenant"),
        (("n", "a/b", {"generate"}, None), "tenant"),
        (("n", "alice", {"root"}, None), "scopes"),
        (("n", "alice", set(), None), "scopes"),
        (("n", "alice", {"generate"}, "short"), "key"),
        (("n", "alice", {"generate"}, " a space at one end"), "key"),
        (("n", "alice", {"generate"}, "unprintable\x07-key-01"), "key"),
    ],
)
def test_what_is_not_acceptable(store: KeyStore, arguments: tuple[str, str, set[str], str | None], field: str) -> None:
    with pytest.raises(ValidationFailed) as refusal:
        store.create(*arguments)
    assert set(refusal.value.fields) == {field}
    assert store.list() == ()
